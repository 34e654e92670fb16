"""Bases tracked beside an optimizer, and handed to another one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg
from tests.layers.models import normal

PARAMS = {"wide": normal(8, 6), "tall": normal(8, 6, seed=1), "bias": jnp.ones(6)}
BASES = {
    path: linalg.EigenBasis(
        jnp.linalg.qr(normal(6, 2, seed=seed))[0], jnp.array([5.0, 3.0]), jnp.array(9.0)
    )
    for seed, path in enumerate(["wide", "tall"])
}
spectral = functools.partial(dsbp_jax.spectral_projection, 2, num_blocks=3)


def gradients(step):
    """Of one leaf; its eigenspaces turn with the steps."""
    return {"wide": PARAMS["wide"] * jnp.cos(step * jnp.arange(6.0))}


def run(tx, **extra):
    """Updates and state after a few steps."""
    update = jax.jit(functools.partial(tx.update, **extra))
    state, updates = tx.init(gradients(0)), None
    for step in range(4):
        updates, state = update(gradients(step), state)
    return updates, state


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("source", "side"), [("gradient", "output"), ("activation", "input")]
)
def test_tracks_like_a_projection_and_changes_no_update(source, side):
    options = dict(source=source, side=side, refresh_every=2, seed=3, num_blocks=4)
    rows = lambda dim: (
        normal(10, dim, seed=dim) * 0.5 ** jnp.arange(dim, dtype=jnp.float32)
    )
    seen = dsbp_jax.LayerActivations(rows(8), rows(6), jnp.int32(10))
    extra = {"activations": {"wide": seen}}
    updates, state = run(dsbp_jax.track_bases(2, **options), **extra)
    equal(updates, gradients(3))
    _, expected = run(dsbp_jax.spectral_projection(2, **options), **extra)
    assert {*state.tracked} == {side}
    assert dsbp_jax.diagnostics(state)["wide"].refreshes == 2
    compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(compare, state, expected)


PROJECTION = spectral()
update = jax.jit(PROJECTION.update, static_argnames="refresh")


def test_there_and_back():
    fresh = PROJECTION.init(PARAMS)
    held = dsbp_jax.with_bases(fresh, BASES)
    equal(dsbp_jax.bases(held), BASES)
    assert jax.tree.structure(held) == jax.tree.structure(fresh)
    updates, after = update(PARAMS, held, refresh=False)
    equal(dsbp_jax.bases(after), BASES)
    for path, (vectors, _, _) in BASES.items():
        expected = PARAMS[path] @ vectors @ vectors.T
        np.testing.assert_allclose(updates[path], expected, atol=1e-5)
    equal(updates["bias"], PARAMS["bias"])


def test_what_is_handed_over_counts_as_solved():
    held = dsbp_jax.with_bases(PROJECTION.init(PARAMS), BASES)
    for _ in range(2):
        _, held = update(PARAMS, held)
    refreshes = [int(d.refreshes) for d in dsbp_jax.diagnostics(held).values()]
    assert sorted(refreshes) == [1, 2]  # one of them is due in the first two steps


def test_a_cold_basis_stays_cold():
    cold = dsbp_jax.bases(dsbp_jax.track_bases(2).init(PARAMS))
    mixed = {**BASES, "tall": cold["tall"]}
    held = dsbp_jax.with_bases(PROJECTION.init(PARAMS), mixed)
    assert dsbp_jax.diagnostics(held)["tall"].refreshes == 0
    updates, _ = update(PARAMS, held, refresh=False)
    equal(updates["tall"], PARAMS["tall"])
    assert np.any(updates["wide"] != PARAMS["wide"])
    _, after = update(PARAMS, held)  # and is solved as ever
    assert dsbp_jax.diagnostics(after)["tall"].refreshes == 1


def test_a_stack_may_be_cold_in_part():
    tx, params = spectral(), {"stack": normal(3, 8, 6)}
    basis = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BASES["wide"])
    basis = basis._replace(trace=jnp.array([9.0, 0.0, 9.0]))
    held = dsbp_jax.with_bases(tx.init(params), {"stack": basis})
    refreshes = dsbp_jax.diagnostics(held)["stack"].refreshes
    np.testing.assert_array_equal(refreshes, [1, 0, 1])


HOLDERS = {
    "chain": optax.chain(optax.clip(9.0), spectral(), optax.adam(0.1)),
    "masked": optax.masked(spectral(), {"wide": True, "tall": True, "bias": False}),
    "injected": optax.inject_hyperparams(
        dsbp_jax.spectral_projection, static_args=dsbp_jax.STATIC_ARGS
    )(rank=2, residual=0.5),
    "tracked": optax.inject_hyperparams(
        dsbp_jax.track_bases, static_args=dsbp_jax.STATIC_ARGS
    )(rank=2),
    "dsbp": dsbp_jax.dsbp(0.1, 2),
    "subspace": dsbp_jax.spectral_subspace(optax.adam(0.1), 2, side="output"),
    "sam": dsbp_jax.spectral_sam(optax.sgd(0.1), 0.1, rank=2),
}


@pytest.mark.parametrize("tx", HOLDERS.values(), ids=HOLDERS)
def test_bases_are_put_wherever_they_are_tracked(tx):
    state = tx.init(PARAMS)
    held = dsbp_jax.with_bases(state, BASES)
    equal(dsbp_jax.bases(held), BASES)
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, state)
    back = dsbp_jax.with_bases(held, dsbp_jax.bases(state))
    equal(dsbp_jax.bases(back), dsbp_jax.bases(state))
    # A random start stays one, in the state of a trained optimizer too.
    equal(dsbp_jax.diagnostics(back), dsbp_jax.diagnostics(state))


def test_one_side_of_two():
    state = spectral(side="both").init(PARAMS)
    held = dsbp_jax.with_bases(state, BASES, side="output")
    equal(dsbp_jax.bases(held, side="output"), BASES)
    equal(dsbp_jax.bases(held, side="input"), dsbp_jax.bases(state, side="input"))


def test_two_sides_want_to_be_told_apart():
    params, basis = {"square": normal(6, 6)}, {"square": BASES["wide"]}
    sides = optax.chain(spectral(side="input"), spectral(side="output"))
    for tx in (spectral(side="both"), sides):
        with pytest.raises(
            ValueError, match=r"side must be .* as of 'square', got None"
        ):
            dsbp_jax.with_bases(tx.init(params), basis)


def test_bad_arguments():
    state = spectral().init(PARAMS)
    wide = {"wide": linalg.init_basis(6, 3, key=jax.random.key(0))}
    with pytest.raises(ValueError, match=r"'wide' must have vectors .*\(6, 2\), .*3\)"):
        dsbp_jax.with_bases(state, wide)
    known = r"bases must name a leaf that the optimizer tracks \(tall, wide\), got"
    with pytest.raises(ValueError, match=f"{known} those of w"):
        dsbp_jax.with_bases(state, {"w": BASES["wide"]})
    with pytest.raises(ValueError, match=f"{known} those of none"):
        dsbp_jax.with_bases(state, {})
    with pytest.raises(ValueError, match=r"bases must name a leaf .*\(none\)"):
        dsbp_jax.with_bases(optax.adam(0.1).init(PARAMS), BASES)
    with pytest.raises(ValueError, match="side must be one of 'input', 'output'"):
        dsbp_jax.with_bases(state, BASES, side="both")
    with pytest.raises(ValueError, match=r"side must be one of .* got 'smaller'"):
        dsbp_jax.track_bases(2, side="smaller")
    tx = dsbp_jax.track_bases(2, source="activation")
    with pytest.raises(ValueError, match="update needs activations="):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_chain_of_two_trackers_takes_leading_columns():
    tx = optax.chain(
        dsbp_jax.spectral_projection(3),
        dsbp_jax.add_spectral_decay(0.1, source="gradient"),
    )
    params = {"w": normal(8, 6), "v": normal(6, 5, seed=1)}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    held = dsbp_jax.with_bases(tx.init(params), dsbp_jax.bases(state))
    for path, (first, second) in dsbp_jax.eigenspaces(held).items():
        expected = dsbp_jax.bases(state)[path].vectors
        np.testing.assert_array_equal(first.vectors, expected)
        np.testing.assert_array_equal(second.vectors, expected[:, :1])
        assert first.solved
        assert second.solved
    # With labels each takes its own back.
    held = dsbp_jax.with_bases(tx.init(params), dsbp_jax.eigenspaces(state))
    equal(dsbp_jax.eigenspaces(held), dsbp_jax.eigenspaces(state))


def test_what_is_put_into_a_state_outlives_its_donation():
    tx = dsbp_jax.track_bases(2)
    params = {"w": normal(8, 6)}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    spaces = dsbp_jax.eigenspaces(state)
    held = dsbp_jax.with_bases(tx.init(params), spaces)
    jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(held)
    assert not spaces["w"][0].vectors.is_deleted()


def test_each_tracker_takes_what_follows_its_own_source():
    """Put back, eigenspaces of two sources are where they came from."""
    tx = optax.chain(
        dsbp_jax.spectral_projection(1), dsbp_jax.track_bases(1, source="activation")
    )
    params, x = {"w": normal(8, 6)}, normal(20, 8, seed=1)
    model = lambda p, x: x @ p["w"]
    _, activations = dsbp_jax.capture_activations(model)(params, x)
    _, state = jax.jit(tx.update)(
        params, tx.init(params), params, activations=activations
    )
    spaces = dsbp_jax.eigenspaces(state)
    held = dsbp_jax.with_bases(tx.init(params), spaces)
    for before, after in zip(spaces["w"], dsbp_jax.eigenspaces(held)["w"], strict=True):
        np.testing.assert_array_equal(before.vectors, after.vectors)
        assert before.source == after.source


def test_a_leaf_whose_side_is_not_tracked_is_named():
    params = {"w": normal(8, 6), "v": normal(7, 5, seed=1)}
    inputs = dsbp_jax.track_bases(2, side="input")
    _, state = inputs.update(params, inputs.init(params), params)
    spaces = dsbp_jax.eigenspaces(state)
    outputs = dsbp_jax.track_bases(2).init(params)
    with pytest.raises(ValueError, match=r"'[vw]' must be of the output side, which"):
        dsbp_jax.with_bases(outputs, spaces)
    for wrong in ([1], jnp.eye(3, 1), {"vectors": 1}):
        with pytest.raises(ValueError, match="must be an Eigenspace, a tuple of them"):
            dsbp_jax.with_bases(outputs, {"w": wrong})
