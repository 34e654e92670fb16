"""Moments in a new basis against dense rotations, for the optimizers of Optax."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsbp_jax.tracking.transport import Coordinate, transport_moments
from tests.layers.models import normal

COORDS = {"block": {"s": normal(4, 6)}, "bias": normal(4, 6, seed=1)}
ROTATION = jnp.linalg.qr(normal(4, 4, seed=2))[0][:, ::-1]
MOVE = {"block": {"s": Coordinate((4, 6), ROTATION)}, "bias": None}


def state_of(tx, steps=3):
    state = tx.init(COORDS)
    for step in range(steps):
        grads = jax.tree.map(lambda c, step=step: jnp.cos(c + step), COORDS)
        _, state = tx.update(grads, state, COORDS)
    return state


def found(state, field):
    return optax.tree.get(state, field)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(-1.0)),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.partition(
            {"in": tx, "out": optax.set_to_zero()}, {"block": "in", "bias": "out"}
        ),
    ],
    ids=["plain", "chain", "multisteps", "apply_if_finite", "partition"],
)
@pytest.mark.promotes  # optax's own
def test_first_moments_rotate_wherever_they_are(wrap):
    state = state_of(wrap(optax.trace(0.9)))
    moved = transport_moments(state, MOVE)
    before, after = (found(s, "trace") for s in (state, moved))
    np.testing.assert_allclose(
        after["block"]["s"], ROTATION @ before["block"]["s"], rtol=1e-5, atol=1e-6
    )
    if isinstance(before["bias"], jax.Array):
        np.testing.assert_array_equal(after["bias"], before["bias"])


@pytest.mark.promotes  # optax's own
def test_second_moments_keep_the_variance():
    """Against the rule, written out on bias-corrected moments."""
    state = state_of(optax.scale_by_adam(b1=0.8, b2=0.99))
    moved = transport_moments(state, MOVE, betas=(0.8, 0.99))
    first, second = (1 - 0.8**3), (1 - 0.99**3)
    mean = np.asarray(state.mu["block"]["s"]) / first
    square = np.asarray(state.nu["block"]["s"]) / second
    r = np.asarray(ROTATION)
    wanted = np.abs((r * r) @ (square - mean**2) + (r @ mean) ** 2) * second
    np.testing.assert_allclose(moved.nu["block"]["s"], wanted, rtol=1e-4)
    np.testing.assert_allclose(
        moved.mu["block"]["s"], r @ state.mu["block"]["s"], rtol=1e-4, atol=1e-6
    )
    assert moved.count == 3


def test_second_moments_without_a_first_are_a_weighted_mean():
    state = state_of(optax.scale_by_rms())
    moved = transport_moments(state, MOVE)
    wanted = ROTATION**2 @ state.nu["block"]["s"]
    np.testing.assert_allclose(moved.nu["block"]["s"], wanted, rtol=1e-4)


def test_stacks_and_windows_rotate_apart():
    coords = normal(2, 9, 4, 6)
    rotation = normal(2, 4, 4, seed=1)
    state = optax.TraceState({"s": coords})
    moved = transport_moments(state, {"s": Coordinate(coords.shape, rotation)})
    wanted = np.einsum("bij,bwjk->bwik", rotation, coords)
    np.testing.assert_allclose(moved.trace["s"], wanted, rtol=1e-4, atol=1e-5)


def test_fields_without_a_rule_raise_and_may_be_given_one():
    state = state_of(optax.scale_by_rss())
    with pytest.raises(ValueError, match=r"sum_of_squares.*of shape \(4, 6\)"):
        transport_moments(state, MOVE)
    kept = transport_moments(state, MOVE, rules={"sum_of_squares": "keep"})
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    doubled = transport_moments(
        state, MOVE, rules={"sum_of_squares": lambda moment, coordinate: 2 * moment}
    )
    np.testing.assert_array_equal(
        doubled.sum_of_squares["block"]["s"], 2 * state.sum_of_squares["block"]["s"]
    )
    with pytest.raises(ValueError, match=re.escape("transport['mu'] must be a funct")):
        transport_moments(state, MOVE, rules={"mu": "third"})


@pytest.mark.parametrize(
    ("tx", "field"),
    [
        (optax.adafactor(1e-3, min_dim_size_to_factor=2), "v_row"),
        (optax.contrib.schedule_free_sgd(1e-3), "z"),
    ],
)
def test_factored_moments_and_averaged_parameters_are_refused(tx, field):
    with pytest.raises(ValueError, match=rf"holds \S*{field}"):
        transport_moments(tx.init(COORDS), MOVE)


def test_the_longest_path_owns_a_leaf():
    coords = {"s": normal(4, 6), "head": {"s": normal(4, 6, seed=1)}}
    state = optax.TraceState(coords)
    moves = {"s": Coordinate((4, 6), ROTATION), "head": {"s": None}}
    moved = transport_moments(state, moves)
    np.testing.assert_allclose(moved.trace["s"], ROTATION @ coords["s"], rtol=1e-5)
    np.testing.assert_array_equal(moved.trace["head"]["s"], coords["head"]["s"])


def test_a_bare_array_is_a_parameter_too():
    state = optax.adam(1e-3).init(COORDS["bias"])
    state = jax.tree.map(lambda x: x + 1, state)
    moved = transport_moments(state, Coordinate((4, 6), ROTATION))
    np.testing.assert_allclose(moved[0].mu, ROTATION @ jnp.ones((4, 6)), rtol=1e-5)
    assert moved[0].count == 1


def test_a_state_without_paths_is_refused():
    state = optax.flatten(optax.trace(0.9)).init(COORDS)
    with pytest.raises(ValueError, match="for no parameter"):
        transport_moments(state, MOVE)


def test_variances_keep_their_size():
    state = optax.ScaleByBeliefState(
        jnp.int32(5),
        {"s": jnp.ones((4, 6))},
        {"s": jnp.full((4, 6), 0.01)},
    )
    moves = {"s": Coordinate((4, 6), ROTATION)}
    moved = transport_moments(state, moves, rules={"nu": "variance"})
    np.testing.assert_allclose(moved.nu["s"], 0.01, rtol=1e-4)


class Scaled(NamedTuple):
    """A user's own layer, whose field is called like that of a Flax variable."""

    value: jax.Array
    mu: jax.Array


@pytest.mark.promotes  # optax.adam
@pytest.mark.parametrize("masked", [False, True])
def test_parameters_may_be_called_like_anything_in_a_state(masked):
    """Fields of Adam, of optax's wrappers, and of nnx; names change nothing."""
    s = lambda seed: normal(4, 6, seed=seed)
    trees = [
        {"nu": s(1), "x": {"nu": s(2), "mu": {"nu": s(3)}}, "y": Scaled(s(4), s(5))},
        {"a": s(1), "b": {"c": s(2), "d": {"e": s(3)}}, "f": {"g": s(4), "h": s(5)}},
    ]
    found = []
    for tree in trees:
        tx = optax.adam(0.1)
        if masked:
            first = jax.tree.leaves(tree)[0]
            tx = optax.masked(tx, jax.tree.map(lambda leaf, f=first: leaf is f, tree))
        state = tx.init(tree)
        for step in range(3):
            grads = jax.tree.map(lambda leaf, k=step: jnp.cos(leaf + float(k)), tree)
            _, state = tx.update(grads, state, tree)
        moves = jax.tree.map(lambda leaf: Coordinate((4, 6), ROTATION), tree)
        moved = transport_moments(state, moves)
        found.append([leaf for leaf in jax.tree.leaves(moved) if leaf.ndim == 2])
    assert len(found[0]) == (2 if masked else 10)
    by_sum = lambda leaves: sorted(leaves, key=lambda leaf: float(leaf.sum()))
    for one, other in zip(*map(by_sum, found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
