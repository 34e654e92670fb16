"""Everything in one chain, as users combine it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from tests.layers.models import normal

X = normal(64, 16) * 0.8 ** np.arange(16, dtype=np.float32)
Y = jnp.asarray(np.sin(2 * np.asarray(X)[:, :4]))
SOURCE = {"a": 0.3 * normal(16, 24), "b": 0.3 * normal(24, 4, seed=1)}


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def loss_fn(params, x, y):
    out, activations = dsbp_jax.capture_activations(model)(params, x)
    return jnp.mean((out - y) ** 2), activations


@jax.jit
def leading(params, x):
    """Bases of the inputs of both kernels."""
    _, activations = dsbp_jax.capture_activations(model)(params, x)
    return dsbp_jax.activation_bases(activations, 3)


def everything():
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        dsbp_jax.spectral_projection(4, source="activation", residual=0.3),
        dsbp_jax.add_spectral_decay(1e-3),
        optax.scale_by_adam(),
        dsbp_jax.add_spectral_transfer(1e-2, SOURCE, leading(SOURCE, X)),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.02, 100)),
    )


def train(tx, params, x, y, steps=60):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        (loss, activations), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, x, y
        )
        updates, state = tx.update(grads, state, params, activations=activations)
        return optax.apply_updates(params, updates), state, loss

    params, losses = jax.tree.map(jnp.copy, params), []
    state = tx.init(params)
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses, step._cache_size()


@functools.cache
def trained_alone():
    """On one device."""
    return train(everything(), SOURCE, X, Y)


@pytest.mark.promotes  # optax.adam
def test_trains_under_jit_with_donated_state():
    losses, compilations = trained_alone()
    assert compilations == 1
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.promotes  # optax.adam
def test_trains_alike_on_a_mesh(mode):
    alone, _ = trained_alone()
    kind = getattr(jax.sharding.AxisType, mode)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    tx = everything()
    with jax.set_mesh(mesh):
        params = {"a": put(SOURCE["a"], None, "model"), "b": put(SOURCE["b"], "model")}
        if mode == "Explicit":  # a contraction over a sharded axis needs a word
            params["b"] = put(SOURCE["b"])
            params["a"] = put(SOURCE["a"])
        sharded, _ = train(tx, params, put(X, "data"), put(Y, "data"), steps=12)
        bases = leading(params, put(X, "data"))
    np.testing.assert_allclose(sharded, alone[:12], rtol=1e-3)
    expected = leading(SOURCE, X)
    for path, basis in bases.items():
        np.testing.assert_allclose(basis.values, expected[path].values, rtol=1e-4)
