"""Rotations against dense exponentials, and what they keep."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import dsbp_jax
from dsbp_jax import Layout, MatrixView
from tests.layers.models import normal
from tests.marks import quick


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def skew(matrix):
    return 0.5 * (matrix - matrix.T)


def train(tx, params, gradient, steps):
    @jax.jit
    def run(params, state):
        def step(carry, count):
            params, state = carry
            updates, state = tx.update(gradient(params, count), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.arange(steps))[0]

    return run(params, tx.init(params))


@pytest.mark.parametrize("source", ["rotation", "gradient"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize(
    "rank", quick([2, 5, 9], [2]), ids=["thin", "crowded", "whole"]
)
def test_a_step_is_that_of_the_dense_exponential(source, side, rank):
    """Algebra elements by dense projectors, exponentials from SciPy."""
    w, g, rate = normal(8, 7), normal(8, 7, seed=1), 0.3
    tx = dsbp_jax.lie_rotation(rate, rank=rank, side=side, source=source)
    updates, state = jax.jit(tx.update)({"w": g}, tx.init({"w": w}), {"w": w})
    wanted = np.asarray(w, np.float64)
    if side != "output":
        wanted = rotation(state, g @ w.T, "input", rate) @ wanted
    if side != "input":
        wanted = wanted @ rotation(state, w.T @ g, "output", rate)
    np.testing.assert_allclose(w + updates["w"], wanted, atol=1e-5)


def rotation(state, product, side, rate):
    a = skew(np.asarray(product, np.float64))
    tracked = state.spectral.tracked.get(side, {})
    if "w" in tracked:
        basis = np.asarray(tracked["w"].basis.vectors, np.float64)
        p = basis @ basis.T
        a = p @ a + a @ p - p @ a @ p
    return scipy.linalg.expm(-rate * a)


@pytest.mark.parametrize("retraction", ["exp", "cayley"])
@pytest.mark.promotes  # the gradients of the test
@pytest.mark.slow
def test_singular_values_outlive_a_thousand_steps(retraction):
    params = {"w": normal(48, 32)}
    noise = lambda p, count: {"w": jnp.cos(p["w"] + count) * jnp.arange(1.0, 33.0) / 32}
    tx = dsbp_jax.lie_rotation(0.05, rank=6, momentum=0.9, retraction=retraction)
    moved, _ = train(tx, params, noise, 1000)
    assert np.linalg.norm(moved["w"] - params["w"]) > np.linalg.norm(params["w"])
    before, after = singular_values(params["w"]), singular_values(moved["w"])
    assert np.abs(after - before).max() < 1e-4 * before[0]


@pytest.mark.promotes  # the gradients of the test
def test_low_precision_kernels_follow_a_float32_master():
    params = {"w": normal(24, 16).astype(jnp.bfloat16)}
    noise = lambda p, count: {"w": jnp.cos(p["w"] + count).astype(jnp.bfloat16)}
    tx = dsbp_jax.lie_rotation(0.05, rank=4)
    moved, state = train(tx, params, noise, 1000)
    assert moved["w"].dtype == jnp.bfloat16
    assert state.master["w"].dtype == jnp.float32
    before, after = singular_values(params["w"]), singular_values(state.master["w"])
    assert np.abs(after - before).max() < 1e-4 * before[0]
    # The kernel is its master, rounded twice at the most.
    error = np.abs(np.asarray(moved["w"], np.float32) - state.master["w"])
    assert error.max() <= 2 * 2.0**-8 * np.abs(state.master["w"]).max()


@pytest.mark.parametrize("rank", [2, 16], ids=["low-rank", "whole"])
def test_procrustes_falls_to_the_known_optimum(rank):
    """`min ‖Q − M‖²` over det Q = 1: the polar factor of M, which has det M > 0."""
    target = jnp.linalg.qr(normal(10, 10))[0]
    target = target.at[:, 0].multiply(jnp.sign(jnp.linalg.det(target)))
    target = target @ jnp.diag(jnp.linspace(2.0, 0.5, 10))
    u, _, vt = np.linalg.svd(np.asarray(target, np.float64))
    optimum = u @ vt
    loss_fn = lambda q: 0.5 * jnp.sum((q - target) ** 2)
    tx = dsbp_jax.lie_rotation(0.05, rank=rank, side="input", refresh_every=1)

    def step(carry, _):
        q, state = carry
        value, grad = jax.value_and_grad(loss_fn)(q)
        updates, state = tx.update(grad, state, q)
        return (q + updates, state), value

    start = jnp.eye(10)
    (q, _), values = jax.jit(
        lambda: jax.lax.scan(step, (start, tx.init(start)), None, length=1500)
    )()
    assert all(b <= a + 1e-5 for a, b in itertools.pairwise(np.asarray(values)))
    best = 0.5 * np.sum((optimum - np.asarray(target)) ** 2)
    np.testing.assert_allclose(values[-1], best, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(q, optimum, atol=1e-2)
    assert np.linalg.det(q) == pytest.approx(1, abs=1e-4)


def test_momentum_is_kept_in_the_algebra_through_a_refresh():
    """One basis that holds everything and turns at each refresh: nothing is lost."""
    space = jnp.linalg.qr(normal(12, 3))[0]
    gradient = lambda p, count: {
        "w": space @ (normal(3, 9) * (1 + jnp.cos(count * jnp.arange(1, 4)))[:, None])
    }
    params = {"w": normal(12, 9, seed=2)}
    make = lambda every: dsbp_jax.lie_rotation(
        1e-3,
        rank=3,
        side="input",
        momentum=0.9,
        radial=0.2,
        refresh_every=every,
        source="gradient",
    )
    # At the twelfth step a direction's weight is at rounding level, and it is lost.
    often, _ = train(make(1), params, gradient, 11)
    never, _ = train(make(100), params, gradient, 11)
    np.testing.assert_allclose(often["w"], never["w"], atol=2e-5)


def test_radial_part_is_the_symmetric_algebra_element():
    w, g = normal(8, 8), normal(8, 8, seed=1)
    step = lambda radial: dsbp_jax.lie_rotation(
        1e-3, rank=8, side="input", radial=radial
    )
    moves = {}
    for radial in (0.0, 1.0):
        tx = step(radial)
        moves[radial], _ = jax.jit(tx.update)(g, tx.init(w), w)
    w, g = np.asarray(w), np.asarray(g)
    symmetric = 0.5 * (g @ w.T + w @ g.T) @ w
    np.testing.assert_allclose(moves[1.0] - moves[0.0], -1e-3 * symmetric, atol=1e-5)
    # Together they are the gradient itself, in the metric of the algebra.
    np.testing.assert_allclose(moves[1.0], -1e-3 * g @ w.T @ w, atol=2e-3)


@pytest.mark.slow
def test_taps_and_stacks_share_and_do_not_share_rotations():
    kernel, grad = normal(2, 3, 8, 6), normal(2, 3, 8, 6, seed=1)
    layout = Layout((("conv", MatrixView((2,), (3,))),))
    tx = dsbp_jax.lie_rotation(0.1, rank=2, layout=layout, num_blocks=4)
    params = {"conv": kernel}
    updates, _ = jax.jit(tx.update)({"conv": grad}, tx.init(params), params)
    moved = kernel + updates["conv"]
    gram = lambda k: np.einsum("abio,abjo->ij", k, k)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(gram(moved)), np.linalg.eigvalsh(gram(kernel)), rtol=1e-4
    )
    stack, grads = kernel[0], grad[0]
    tx = dsbp_jax.lie_rotation(0.1, rank=2, num_blocks=4)
    update = jax.jit(tx.update)
    together, _ = update(grads, tx.init(stack), stack)
    for index in range(3):
        alone, _ = update(grads[index], tx.init(stack[index]), stack[index])
        np.testing.assert_allclose(together[index], alone, atol=1e-4)


@pytest.mark.promotes  # optax.adam
def test_rotations_on_some_leaves_adam_on_others():
    params = {"w": normal(8, 8), "head": normal(8, 3), "b": jnp.ones(3)}
    labels = {"w": "rotate", "head": "adam", "b": "adam"}
    tx = optax.partition(
        {"rotate": dsbp_jax.lie_rotation(0.1, rank=2), "adam": optax.adam(1e-2)}, labels
    )
    grads = jax.tree.map(jnp.cos, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(np.abs(updates["head"]), 1e-2, rtol=1e-3)
    np.testing.assert_allclose(
        singular_values(params["w"] + updates["w"]),
        singular_values(params["w"]),
        atol=1e-5,
    )


def test_other_leaves_take_plain_steps():
    params = {"w": normal(8, 8), "b": jnp.ones(3)}
    tx = dsbp_jax.lie_rotation(optax.constant_schedule(0.1), rank=2, momentum=0.9)
    state, update = tx.init(params), jax.jit(tx.update)
    for wanted in (-0.1, -0.19):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        np.testing.assert_allclose(updates["b"], wanted, rtol=1e-5)


def test_narrow_gradients_do_not_round_the_steps_of_wide_kernels():
    w, g = normal(8, 8), normal(8, 8, seed=1)
    tx = dsbp_jax.lie_rotation(0.1, rank=2)
    updates, _ = jax.jit(tx.update)(g.astype(jnp.bfloat16), tx.init(w), w)
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(
        singular_values(w + updates), singular_values(w), atol=1e-5
    )


@pytest.mark.promotes  # the gradients of the test
def test_under_x64_the_state_stays_float32():
    with jax.enable_x64(True):
        w = normal(8, 3).astype(jnp.float32)
        tx = dsbp_jax.lie_rotation(
            lambda count: 0.1 / (1 + count), rank=4, momentum=0.9
        )
        _, state = jax.jit(tx.update)(w, tx.init(w), w)
        wide = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float64]
        assert not wide


def test_bad_arguments():
    with pytest.raises(ValueError, match="retraction must be one of 'exp', 'cayley'"):
        dsbp_jax.lie_rotation(0.1, rank=2, retraction="qr")
    with pytest.raises(ValueError, match=r"side must be one of .*, got 'left'"):
        dsbp_jax.lie_rotation(0.1, rank=2, side="left")
    with pytest.raises(ValueError, match=r"radial must be a number in \[0, 1\], got 2"):
        dsbp_jax.lie_rotation(0.1, rank=2, radial=2)
    with pytest.raises(ValueError, match="momentum must be a number in"):
        dsbp_jax.lie_rotation(0.1, rank=2, momentum=-1)
    with pytest.raises(ValueError, match="learning_rate must be a finite number"):
        dsbp_jax.lie_rotation(-0.1, rank=2)
    with pytest.raises(ValueError, match="rank must be an int of at least 1"):
        dsbp_jax.lie_rotation(0.1, rank=0)
    tx = dsbp_jax.lie_rotation(0.1, rank=2)
    with pytest.raises(ValueError, match="lie_rotation needs params"):
        tx.update(jnp.ones((4, 4)), tx.init(jnp.ones((4, 4))))
