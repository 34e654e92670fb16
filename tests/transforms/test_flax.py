"""The recipes of the README, for Flax linen and nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

import dsbp_jax

X = jax.random.normal(jax.random.key(0), (32, 6))
TARGET = jnp.sin(X @ jax.random.normal(jax.random.key(1), (6, 3)))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = linen.tanh(linen.Dense(16)(x))
        return linen.Dense(3)(hidden)


class TrainState(train_state.TrainState):
    """Forwards extra arguments to the optimizer."""

    def apply_gradients(self, *, grads, **extra):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


@pytest.mark.parametrize("source", ["gradient", "activation"])
def test_linen_train_state(source):
    model = LinenModel()
    params = model.init(jax.random.key(0), X)["params"]
    apply = dsbp_jax.capture_activations(lambda p, x: model.apply({"params": p}, x))
    tx = dsbp_jax.dsbp(0.1, 4, source=source, residual=0.1)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss_fn(params):
        out, activations = apply(params, X)
        return jnp.mean((out - TARGET) ** 2), activations

    @jax.jit
    def step(state):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, activations), grads = grad_fn(state.params)
        return state.apply_gradients(grads=grads, activations=activations), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(loss)
    assert losses[-1] < 0.3 * losses[0]
    held = dsbp_jax.bases(state.opt_state)
    assert held.keys() == {"Dense_0/kernel"}  # the head is narrower than the rank
    assert held["Dense_0/kernel"].vectors.shape == (16, 4)


def test_linen_variables_have_other_paths():
    """Captured from `model.apply`, paths begin with `params/`: the error says so."""
    model = LinenModel()
    variables = model.init(jax.random.key(0), X)
    _, activations = dsbp_jax.capture_activations(model.apply)(variables, X)
    tx = dsbp_jax.dsbp(0.1, 4, source="activation")
    params = variables["params"]
    with pytest.raises(ValueError, match=r"nearest .* is 'params/Dense_0/kernel'"):
        tx.update(params, tx.init(params), params, activations=activations)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.hidden(x)))


@pytest.mark.parametrize("source", ["gradient", "activation"])
def test_nnx_optimizer(source):
    model = NnxModel(nnx.Rngs(0))
    tx = dsbp_jax.dsbp(0.1, 4, source=source, residual=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @dsbp_jax.capture_activations
        def forward(params, x):
            return nnx.merge(graph, params, rest, copy=True)(x)

        def loss_fn(params):
            out, activations = forward(params, X)
            return jnp.mean((out - TARGET) ** 2), activations

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, activations), grads = grad_fn(params)
        optimizer.update(model, grads, activations=activations)
        return loss

    losses = [step(model, optimizer) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    held = dsbp_jax.bases(optimizer.opt_state)
    assert held.keys() == {"hidden/kernel"}
    vectors = held["hidden/kernel"].vectors
    assert isinstance(vectors, jax.Array)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=1e-5)
    assert dsbp_jax.diagnostics(optimizer.opt_state)["hidden/kernel"].refreshes >= 6
