import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg
from tests.layers.models import normal
from tests.transforms import models


def reference(loss_fn, params, rho):
    """Foret et al., algorithm 1, on numpy arrays."""
    gradient = jax.jit(jax.grad(loss_fn))
    grads = jax.tree.map(np.asarray, gradient(params))
    norm = np.sqrt(
        sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
    )
    perturbed = jax.tree.map(lambda p, g: p + rho * g / norm, params, grads)
    return gradient(perturbed)


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


@pytest.mark.promotes  # the loss meets float32 params
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


@pytest.mark.slow
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


# Modes


def project_tree(tree, bases):
    return {
        name: leaf @ bases[name].vectors @ bases[name].vectors.T
        if name in bases
        else leaf
        for name, leaf in tree.items()
    }


def quadratic(params):
    curvature = jnp.arange(1.0, 9.0)
    return 0.5 * jnp.sum(curvature * params["w"] ** 2) + jnp.sum(params["b"] ** 4)


PARAMS = {"w": normal(6, 8), "b": normal(3, seed=1)}
BASES = {
    "w": linalg.EigenBasis(
        jnp.linalg.qr(normal(8, 3, seed=2))[0], jnp.ones(3), jnp.ones(())
    )
}


def moved(direction, rho):
    norm = np.sqrt(sum(float(jnp.sum(d**2)) for d in direction.values()))
    return {name: PARAMS[name] + rho * d / norm for name, d in direction.items()}


def close(actual, expected, atol=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected
    )


def test_spectral_mode_perturbs_inside_the_bases():
    estimate = dsbp_jax.sam_value_and_grad(
        jax.value_and_grad(quadratic), 0.3, mode="spectral", bases=BASES
    )
    value, grads = jax.jit(estimate)(PARAMS)
    inside = project_tree(jax.grad(quadratic)(PARAMS), BASES)
    assert value == pytest.approx(float(quadratic(PARAMS)), rel=1e-5)
    close(grads, jax.grad(quadratic)(moved(inside, 0.3)))


def test_eigen_mode_tilts_towards_the_hessians_top_eigenvector():
    operator = linalg.hessian(quadratic, PARAMS)
    basis = linalg.top_eigenpairs(operator, 1, key=jax.random.key(0))
    estimate = dsbp_jax.sam_value_and_grad(
        jax.value_and_grad(quadratic), 0.3, mode="eigen", bases=basis, alpha=0.5
    )
    _, grads = jax.jit(estimate)(PARAMS)
    flat, unravel = jax.flatten_util.ravel_pytree(jax.grad(quadratic)(PARAMS))
    g, v = flat / jnp.linalg.norm(flat), basis.vectors[:, 0]
    step = 0.3 * (g + 0.5 * jnp.sign(flat @ v) * (v - (g @ v) * g))
    point = jax.tree.map(jnp.add, PARAMS, unravel(step))
    close(grads, jax.grad(quadratic)(point))


def test_sketched_gradients_and_coordinates_are_perturbed_too():
    x = normal(64, 16)
    params = {"k": normal(16, 24), "o": normal(24, 2)}
    loss_fn = lambda p, x: jnp.mean(jnp.tanh(x @ p["k"]) @ p["o"] ** 2)
    backprop = dsbp_jax.spectral_backprop(loss_fn, rank=16)  # exact: as wide as k
    state = jax.jit(backprop.init)(params, x, key=jax.random.key(0))
    estimate = dsbp_jax.sam_value_and_grad(backprop.value_and_grad, 0.2)
    value, grads, state = jax.jit(estimate)(params, state, x)
    plain = dsbp_jax.sam_value_and_grad(jax.value_and_grad(loss_fn), 0.2)
    wanted_value, wanted = jax.jit(plain)(params, x)
    assert value == pytest.approx(float(wanted_value), rel=1e-5)
    close(grads, wanted)
    training = dsbp_jax.spectral_coordinates(loss_fn, rank=4)
    coords, frame = jax.jit(training.init)(params, x, key=jax.random.key(0))
    estimate = dsbp_jax.sam_value_and_grad(training.value_and_grad, 0.2)
    value, grads = jax.jit(estimate)(coords, frame, x)
    assert value == pytest.approx(float(wanted_value), rel=1e-5)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, coords)


def test_microbatches_make_the_same_perturbation():
    x = normal(32, 8)
    loss_fn = lambda p, x: jnp.mean(jnp.sum((x * p["w"][0]) ** 2, axis=1))
    gradient = jax.value_and_grad(loss_fn)
    mean = optax.microbatching.AccumulationType.MEAN
    split = optax.microbatching.microbatch(gradient, 1, 8, mean)
    value, grads = dsbp_jax.sam_value_and_grad(split, 0.3)(PARAMS, x)
    wanted_value, wanted = dsbp_jax.sam_value_and_grad(gradient, 0.3)(PARAMS, x)
    assert value == pytest.approx(float(wanted_value), rel=1e-5)
    close(grads, wanted)


def test_bad_arguments_of_the_modes():
    make = lambda **kwargs: dsbp_jax.sam_value_and_grad(
        jax.value_and_grad(quadratic), 0.1, **kwargs
    )
    with pytest.raises(ValueError, match=r"bases must be a dict .*, got None"):
        make(mode="spectral")
    with pytest.raises(ValueError, match=r"bases must be an EigenBasis .*, got dict"):
        make(mode="eigen", bases=BASES)
    with pytest.raises(ValueError, match="bases must be None with mode='full'"):
        make(bases=BASES)
    with pytest.raises(ValueError, match=r"bases of 'w' must have vectors of shape"):
        make(mode="spectral", bases=BASES, side="input")(PARAMS)
    short = linalg.init_basis(5, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="Hessian of all 51 parameters"):
        make(mode="eigen", bases=short)(PARAMS)
    with pytest.raises(ValueError, match="alpha must be a finite number of at least 0"):
        make(alpha=-1)
    with pytest.raises(ValueError, match="bases must hold the basis of at least one"):
        make(mode="spectral", bases={})
    with pytest.raises(ValueError, match="rank must be None with mode='full', got 2"):
        dsbp_jax.spectral_sam(optax.sgd(0.1), 0.1, mode="full", rank=2)
    with pytest.raises(ValueError, match=r"rank must be an int .* tracks no bases"):
        dsbp_jax.spectral_sam(optax.sgd(0.1), 0.1).init(PARAMS)
    tx = dsbp_jax.spectral_sam(optax.sgd(0.1), 0.1, rank=2)
    grads = jax.grad(quadratic)(PARAMS)
    with pytest.raises(ValueError, match="spectral_sam needs grad_fn"):
        tx.update(grads, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="spectral_sam needs params"):
        tx.update(grads, tx.init(PARAMS), grad_fn=lambda params, i: grads)


@pytest.mark.promotes  # the loss of bfloat16 data at float32 params
def test_a_radius_below_the_spacing_of_bfloat16_is_not_lost():
    w = jnp.ones(1000, jnp.bfloat16)
    seen = []

    def value_and_grad(w):
        seen.append(w)
        return jnp.sum(w), jnp.ones_like(w)

    _, grads = dsbp_jax.sam_value_and_grad(value_and_grad, 0.05)(w)
    moved = seen[1] - seen[0].astype(jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(moved), 0.05, rtol=1e-3)
    assert grads.dtype == jnp.bfloat16
