"""A loss is traced once by whatever is done with it: tracing is what users wait for."""

import jax
import jax.numpy as jnp
import optax
import pytest

import dsbp_jax
from tests.layers.models import normal


@pytest.fixture
def counted():
    """A loss, its params and a batch, and the list of its calls."""
    calls = []

    def loss(params, x):
        calls.append(1)
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    params = {"a": normal(24, 20), "b": normal(20, 16, seed=1)}
    return loss, params, normal(40, 24, seed=2), calls


def test_a_sketched_step_traces_once(counted):
    loss, params, x, calls = counted
    backprop = dsbp_jax.spectral_backprop(loss, rank=4, refresh_every=None)
    state = jax.jit(backprop.init)(params, x, key=jax.random.key(0))
    assert len(calls) == 1
    for step in (backprop.value_and_grad, backprop.refresh):
        calls.clear()
        jax.jit(step)(params, state, x)
        assert len(calls) == 1
    calls.clear()
    jax.jit(lambda *args: backprop.catch_up(*args, every=4))(params, state, x)
    assert len(calls) == 1


def test_coordinates_trace_once(counted):
    loss, params, x, calls = counted
    training = dsbp_jax.spectral_coordinates(loss, rank=4)
    coords, frame = jax.jit(training.init)(params, x, key=jax.random.key(0))
    assert len(calls) == 1
    calls.clear()
    jax.jit(training.value_and_grad)(coords, frame, x)
    assert len(calls) == 1
    calls.clear()
    jax.jit(training.fold)(coords, frame, optax.adam(1e-3).init(coords), x)
    assert len(calls) == 1
