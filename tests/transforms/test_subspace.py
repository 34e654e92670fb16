"""Optimizers in the subspace against the same ones on dense projections."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView
from tests.layers.models import normal

RANK = 3


def decaying(*shape, seed=0):
    return normal(*shape, seed=seed) * 0.5 ** jnp.arange(shape[-1], dtype=jnp.float32)


def step(tx, grads, state, params=None, **extra):
    return jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))(grads, state, params)


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_sgd_gives_the_projected_gradient(side):
    grads = {"w": decaying(12, 10)}
    tx = dsbp_jax.spectral_subspace(optax.sgd(0.5), RANK, side=side)
    updates, state = step(tx, grads, tx.init(grads))
    wanted = grads["w"]
    for each in ("input", "output") if side == "both" else (side,):
        basis = dsbp_jax.bases(state, side=each)["w"].vectors
        projector = basis @ basis.T
        wanted = projector @ wanted if each == "input" else wanted @ projector
    np.testing.assert_allclose(updates["w"], -0.5 * wanted, atol=1e-5)


def test_the_smaller_side_is_that_of_the_smaller_dimension():
    params = {"wide": normal(8, 20), "tall": normal(20, 8), "flat": normal(3, 20)}
    state = dsbp_jax.spectral_subspace(optax.adam(1e-3), RANK, side="smaller").init(
        params
    )
    shapes = jax.tree.map(jnp.shape, state.inner[0].mu)
    assert shapes == {"wide": (3, 20), "tall": (20, 3), "flat": (3, 20)}
    assert "flat" not in dsbp_jax.bases(state)


def test_full_residual_of_sgd_is_sgd():
    grads = {"w": decaying(12, 10), "stack": decaying(4, 9, 8, seed=1)}
    tx = dsbp_jax.spectral_subspace(optax.sgd(0.5), RANK, residual=1.0)
    updates, _ = step(tx, grads, tx.init(grads))
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -0.5 * g, atol=1e-5), updates, grads
    )


@pytest.mark.promotes  # optax.adam
def test_the_residual_of_a_stack_is_that_of_each_matrix():
    stack = decaying(3, 9, 8) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    tx = dsbp_jax.spectral_subspace(optax.adam(0.1), RANK, residual=0.5, num_blocks=12)
    together, _ = step(tx, {"w": stack}, tx.init({"w": stack}))
    for index, matrix in enumerate(stack):
        alone, _ = step(tx, {"w": matrix}, tx.init({"w": matrix}))
        np.testing.assert_allclose(together["w"][index], alone["w"], atol=1e-4)


def test_a_refresh_that_only_rotates_leaves_momentum_alone():
    """Gradients of one column space: the basis turns inside it, the updates do not."""
    space = jnp.linalg.qr(normal(12, RANK))[0]
    gradient = lambda t: {
        "w": space
        @ (normal(RANK, 10) * (1 + jnp.cos(t * jnp.arange(1, RANK + 1)))[:, None])
    }
    tx = dsbp_jax.spectral_subspace(
        optax.sgd(0.1, momentum=0.9), RANK, side="input", refresh_every=1
    )
    _, fresh = step(tx, gradient(0), tx.init(gradient(0)))
    still = fresh
    for t in range(1, 5):
        a, fresh = step(tx, gradient(t), fresh)
        b, still = step(tx, gradient(t), still, refresh=False)
        difference = np.linalg.norm(a["w"] - b["w"])
        assert difference < 1e-5 * np.linalg.norm(b["w"])
    turned = dsbp_jax.bases(fresh)["w"].vectors.T @ dsbp_jax.bases(still)["w"].vectors
    assert np.abs(np.abs(turned) - np.eye(RANK)).max() > 0.1


def test_moments_follow_a_refresh():
    """Momentum after a refresh is the dense one, projected on the new basis."""
    grads = [{"w": decaying(12, 10, seed=seed)} for seed in range(2)]
    tx = dsbp_jax.spectral_subspace(
        optax.trace(0.9), RANK, side="input", refresh_every=1
    )
    _, state = step(tx, grads[0], tx.init(grads[0]))
    old = dsbp_jax.bases(state)["w"].vectors
    updates, state = step(tx, grads[1], state)
    new = dsbp_jax.bases(state)["w"].vectors
    kept = new @ (new.T @ (old @ (old.T @ grads[0]["w"])))
    wanted = new @ (new.T @ grads[1]["w"]) + 0.9 * kept
    np.testing.assert_allclose(updates["w"], wanted, atol=1e-5)


def test_the_optimizer_sees_params_in_coordinates():
    seen = []

    def update(updates, state, params=None):
        seen.append(jax.tree.map(jnp.shape, params))
        return updates, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    layout = Layout((("conv", MatrixView((2,), (3,))),))
    params = {"conv": normal(3, 3, 8, 20), "bias": normal(20)}
    tx = dsbp_jax.spectral_subspace(inner, RANK, layout=layout)
    tx.update(params, tx.init(params), params)
    assert seen == [{"conv": (9, RANK, 20), "bias": (20,)}]


def test_the_loss_jumps_at_a_refresh_unless_the_moments_follow():
    """A basis that turns inside its span: the same problem, in other coordinates."""
    target = jnp.linalg.qr(normal(12, RANK))[0] @ normal(RANK, 10, seed=2)
    scale = 1 + 0.9 * jnp.cos(jnp.arange(10))
    loss_fn = lambda w: 0.5 * jnp.sum(scale * (w - target) ** 2)

    def worst_rise(transport):
        tx = dsbp_jax.spectral_subspace(
            optax.sgd(0.05, momentum=0.9),
            RANK,
            side="input",
            refresh_every=5,
            transport=transport,
        )
        w = jnp.zeros((12, 10))
        state, losses, rises = tx.init(w), [], []
        update = jax.jit(tx.update)
        for count in range(30):
            losses.append(float(loss_fn(w)))
            updates, state = update(jax.grad(loss_fn)(w), state)
            w = w + updates
            if count and count % 5 == 0:  # refreshed with this update
                rises.append(float(loss_fn(w)) / losses[-1])
        return max(rises)

    followed, left_behind = worst_rise(None), worst_rise({"trace": "keep"})
    assert followed < 1.1
    assert left_behind > 1.3 * followed


def test_the_complement_grows_by_a_factor_at_most():
    """Against the norm of what is outside the basis, written out."""
    grads = [{"w": scale * decaying(12, 10)} for scale in (1.0, 10.0, 10.0)]
    make = lambda limit: dsbp_jax.spectral_subspace(
        optax.sgd(1.0), RANK, side="input", residual=1.0, max_growth=limit
    )
    limited, free = make(1.5), make(None)
    state, other = limited.init(grads[0]), free.init(grads[0])
    norms = []
    for grad in grads:
        updates, state = step(limited, grad, state)
        _, other = step(free, grad, other)
        basis = dsbp_jax.bases(state)["w"].vectors
        outside = updates["w"] - basis @ (basis.T @ updates["w"])
        norms.append(float(jnp.linalg.norm(outside)))
    np.testing.assert_allclose(norms[1:], [1.5 * norms[0], 2.25 * norms[0]], rtol=1e-4)
    assert other.complement == {}


@pytest.mark.promotes  # optax.adam
def test_leaves_of_one_name_are_told_apart():
    params = {"w": normal(32, 48), "head": {"w": normal(4, 7)}}
    tx = dsbp_jax.spectral_subspace(optax.adam(1e-2), 4)
    state = tx.init(params)
    for _ in range(2):
        _, state = step(tx, params, state, params, refresh=True)
    assert state.inner[0].mu["head"]["w"].shape == (4, 7)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"side must be one of .*'smaller'"):
        dsbp_jax.spectral_subspace(optax.sgd(0.1), 4, side="left")
    with pytest.raises(ValueError, match="residual must be a number in"):
        dsbp_jax.spectral_subspace(optax.sgd(0.1), 4, residual=2.0)
    with pytest.raises(ValueError, match=r"max_growth must be .* at least 1, got"):
        dsbp_jax.spectral_subspace(optax.sgd(0.1), 4, max_growth=0.5)
    flat = dsbp_jax.spectral_subspace(optax.flatten(optax.trace(0.9)), RANK)
    grads = {"w": decaying(12, 10)}
    with pytest.raises(ValueError, match=r"trace.* for no parameter"):
        flat.update(grads, flat.init(grads), grads)


def test_a_second_derivative_at_a_gradient_of_zero_is_finite():
    """The first inner step of a network with a head of zeros."""
    x, y = normal(3, 10, 6), normal(3, 10, 2, seed=1)
    params = {"body": normal(6, 5, seed=2), "head": jnp.zeros((5, 2))}
    loss_fn = lambda p, b: jnp.mean(
        (jnp.tanh(b[0] @ p["body"]) @ p["head"] - b[1]) ** 2
    )
    inner = dsbp_jax.spectral_subspace(optax.sgd(0.1), 2, residual=0.1)
    learner = dsbp_jax.meta.maml(loss_fn, inner, 1)
    grads = jax.jit(jax.grad(learner.meta_loss))(params, ((x, y), (x, y)))
    assert all(bool(jnp.isfinite(g).all()) for g in grads.values())
    assert any(bool(g.any()) for g in grads.values())


def test_functions_among_the_params():
    params = {"w": normal(8, 6), "f": jnp.tanh}
    tx = dsbp_jax.spectral_subspace(optax.identity(), 2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["f"] is jnp.tanh
