import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from tests.transforms import models


def reference(loss_fn, params, rho):
    """Foret et al., algorithm 1, on numpy arrays."""
    grads = jax.tree.map(np.asarray, jax.grad(loss_fn)(params))
    norm = np.sqrt(
        sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
    )
    perturbed = jax.tree.map(lambda p, g: p + rho * g / norm, params, grads)
    return jax.grad(loss_fn)(perturbed)


@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0])
def test_against_the_reference(rho):
    params = models.params()
    estimate = dsbp_jax.sam_value_and_grad(jax.value_and_grad(models.loss_fn), rho)
    value, grads = jax.jit(estimate)(params)
    np.testing.assert_allclose(value, models.loss_fn(params), rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads,
        reference(models.loss_fn, params, rho),
    )


def test_zero_gradient_is_not_perturbed():
    estimate = dsbp_jax.sam_value_and_grad(jax.value_and_grad(jnp.sum), 0.1)
    flat = lambda w: jnp.sum(w**2)
    value, grads = dsbp_jax.sam_value_and_grad(jax.value_and_grad(flat), 0.1)(
        jnp.zeros(3)
    )
    assert value == 0
    np.testing.assert_array_equal(grads, 0)
    assert np.isfinite(estimate(jnp.zeros(3))[1]).all()


def test_aux_and_further_arguments_pass_through():
    def loss_fn(w, x, *, scale):
        return scale * jnp.sum((x * w) ** 2), {"seen": w}

    estimate = dsbp_jax.sam_value_and_grad(
        jax.value_and_grad(loss_fn, has_aux=True), 0.1
    )
    w = jnp.ones(2, jnp.bfloat16)
    (value, aux), grads = estimate(w, jnp.ones(2, jnp.bfloat16), scale=2)
    assert value == 4
    np.testing.assert_array_equal(aux["seen"], w)
    assert grads.dtype == jnp.bfloat16


def test_composes_with_dsbp():
    tx = dsbp_jax.dsbp(0.05, 3, residual=0.3)
    estimate = dsbp_jax.sam_value_and_grad(jax.value_and_grad(models.loss_fn), 0.05)

    @jax.jit
    def step(params, state):
        _, grads = estimate(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = models.params()
    state = tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert models.loss_fn(params) < 0.05 * models.loss_fn(models.params())


@pytest.mark.parametrize("scale", [1e-24, 1e22])
def test_perturbs_by_rho_at_any_scale(scale):
    quadratic = lambda w: 0.5 * scale * jnp.sum(w**2)
    estimate = dsbp_jax.sam_value_and_grad(jax.value_and_grad(quadratic), 0.5)
    _, grads = estimate(jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(grads / scale, [3.3, 4.4], rtol=1e-5)


def test_leaves_without_a_gradient_stay():
    def value_and_grad(model, x):
        value, grad = jax.value_and_grad(lambda w: model["f"](w * x))(model["w"])
        return value, {"f": None, "w": grad}

    model = {"f": lambda y: y**2, "w": jnp.float32(1)}
    _, grads = dsbp_jax.sam_value_and_grad(value_and_grad, 0.5)(model, 2.0)
    assert grads["f"] is None
    np.testing.assert_allclose(grads["w"], 12.0)


def test_bad_arguments():
    for rho in (-1.0, float("nan"), "big"):
        with pytest.raises(ValueError, match="rho must be a finite number of at least"):
            dsbp_jax.sam_value_and_grad(jax.value_and_grad(jnp.sum), rho)
    with pytest.raises(
        ValueError, match="mode must be one of 'full', 'spectral', 'eigen', got 'half'"
    ):
        dsbp_jax.sam_value_and_grad(jax.value_and_grad(jnp.sum), 0.1, mode="half")
