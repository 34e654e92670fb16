"""Optimizers on problems with a known minimum, and under gradient accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from tests.layers.models import normal
from tests.transforms import models

TARGET = normal(10, 8) * 0.7 ** jnp.arange(8, dtype=jnp.float32)


def parabola(params):
    """A vector and a matrix, both far from their minimum."""
    return jnp.sum((params["v"] - 2) ** 2) + jnp.sum((params["w"] - TARGET) ** 2)


def rosenbrock(params):
    """Eight valleys side by side, the columns of a matrix."""
    x, y = params["w"]
    return jnp.mean((1 - x) ** 2 + 10 * (y - x**2) ** 2)


def factorization(params):
    """`‖UV − M‖²` for M of rank 3: not convex, and without bad minima."""
    low_rank = TARGET[:, :3] @ normal(3, 8, seed=3)
    return jnp.mean((params["u"] @ params["v"] - low_rank) ** 2)


PROBLEMS = {
    "parabola": (parabola, {"v": jnp.zeros(3), "w": jnp.zeros((10, 8))}),
    "rosenbrock": (rosenbrock, {"w": jnp.zeros((2, 8))}),
    "factorization": (
        factorization,
        {"u": 0.5 * normal(10, 4, seed=1), "v": 0.5 * normal(4, 8, seed=2)},
    ),
    "every kind of leaf": (models.loss_fn, models.params()),
}
OPTIMIZERS = {
    "dsbp": lambda rate: dsbp_jax.dsbp(rate, 2, residual=0.5, layout=None),
    "spectral_subspace": lambda rate: dsbp_jax.spectral_subspace(
        optax.sgd(rate, momentum=0.9), 2, residual=0.5, refresh_every=2
    ),
    "spectral_sam": lambda rate: dsbp_jax.spectral_sam(
        optax.sgd(rate, momentum=0.9), 1e-3, rank=2
    ),
}
RATES = {
    "parabola": 0.02,
    "rosenbrock": 0.05,
    "factorization": 0.5,
    "every kind of leaf": 0.02,
}


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def minimise(tx, loss_fn, params, steps):
    def step(carry, _):
        params, state = carry
        grad_fn = lambda params, i: jax.grad(loss_fn)(params)
        updates, state = tx.update(
            grad_fn(params, 0), state, params, grad_fn=grad_fn, value=0.0
        )
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_known_minimum_is_reached(optimizer, problem):
    loss_fn, start = PROBLEMS[problem]
    tx = OPTIMIZERS[optimizer](RATES[problem])
    end = minimise(tx, loss_fn, start, 600)
    assert loss_fn(end) < 1e-3 * loss_fn(start)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.promotes  # optax.MultiSteps
def test_accumulated_gradients_are_one_large_batch(optimizer):
    """Each half of a batch in turn, through `optax.MultiSteps`."""
    x, y = (
        normal(32, 6),
        normal(32, 5, seed=1) * 0.4 ** jnp.arange(5, dtype=jnp.float32),
    )
    loss_fn = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    tx = OPTIMIZERS[optimizer](0.1)
    w = jnp.zeros((6, 5))
    whole = lambda w, i: jax.grad(loss_fn)(w, x, y)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)
    plain, state = (w, tx.init(w)), (w, accumulating.init(w))
    once, half = (
        jax.jit(lambda w, s: tx.update(whole(w, 0), s, w, grad_fn=whole)),
        jax.jit(
            lambda w, s, x, y: accumulating.update(
                jax.grad(loss_fn)(w, x, y), s, w, grad_fn=whole
            )
        ),
    )
    for _ in range(4):
        updates, inner = once(*plain)
        plain = optax.apply_updates(plain[0], updates), inner
        for part in (slice(0, 16), slice(16, 32)):
            updates, inner = half(*state, x[part], y[part])
            state = optax.apply_updates(state[0], updates), inner
    np.testing.assert_allclose(state[0], plain[0], atol=1e-4)
