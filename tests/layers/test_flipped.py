"""Kernels that are reversed along some axis before they meet the input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax import spectral_backprop, spectral_coordinates
from dsbp_jax.layers import capture_activations, layout
from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.rewrite import evaluate
from tests.layers.models import normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

X = normal(5, 4)
IMAGE = normal(2, 5, 6, 4)


def heads(p, x):
    """Flipped before the heads are taken apart: each digit of the axis is."""
    return jnp.einsum("bd,dhk->bhk", x, p[:, ::-1].reshape(4, 3, 2)[:, :, ::-1])


def blocks(p, x):
    def step(h, w):
        y = h @ w
        return jnp.tanh(y), y

    return lax.scan(step, x, p[::-1])[1]


def mixture(p, x):
    return jnp.einsum("ebd,edk->ebk", jnp.stack([x, 2 * x, 3 * x]), p[::-1])


def convolution(p, x):
    return lax.conv_general_dilated(
        x,
        jnp.flip(p, (0, 1)),
        (1, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def channels(p, x):
    return convolution(jnp.flip(p, (1, 2)), x)


MODELS = {
    "rows": (lambda p, x: x @ p[::-1], (4, 3), X),
    "columns": (lambda p, x: x @ p[:, ::-1], (4, 3), X),
    "both, transposed": (lambda p, x: x @ jnp.flip(p).T, (3, 4), X),
    "twice": (lambda p, x: x @ p[::-1][::-1], (4, 3), X),
    "heads": (heads, (4, 6), X),
    "layers": (blocks, (3, 4, 4), X),
    "experts": (mixture, (3, 4, 2), X),
    "taps": (convolution, (3, 2, 4, 3), IMAGE),
    "taps and channels": (channels, (3, 2, 4, 3), IMAGE),
}


@pytest.fixture(params=MODELS)
def flipped(request):
    return MODELS[request.param]


def test_activations_are_in_the_order_of_the_leaf(flipped):
    model, shape, x = flipped
    found = trace(model, normal(*shape), (x,), {})
    assert len(found.sites) == 1
    assert not found.uses
    out, seen = capture_activations(model)(normal(*shape), x)
    np.testing.assert_allclose(out, model(normal(*shape), x), rtol=1e-6, atol=1e-6)
    matrix = layout(model, normal(*shape), x)[""].to_matrix(normal(*shape))
    if matrix.shape[-3] == 1:
        wanted = seen[""].inputs @ matrix[..., 0, :, :]
        np.testing.assert_allclose(seen[""].outputs, wanted, rtol=1e-5, atol=1e-5)


def run(model, visit, params, x, extra):
    traced = trace(model, params, (x,), {})
    outputs, _ = evaluate(traced, visit, array_leaves((params, x)), {"": extra})
    return traced.unflatten(outputs)


def orthonormal(view, shape):
    *batch, _, dim, _ = view.matrix_shape(shape)
    return jnp.linalg.qr(normal(*batch, dim, 2, seed=3))[0]


def test_sketched_gradient_is_the_projected_one(flipped):
    model, shape, x = flipped
    view = layout(model, normal(*shape), x)[""]
    basis = orthonormal(view, shape)

    def visit(product, x, w, basis):
        return product.sketched(x, w, basis, product.restrict(w, basis)), None

    loss = lambda fn: lambda p: jnp.sum(jnp.sin(fn(p)))
    sketched = loss(lambda p: run(model, visit, p, x, basis))
    value, gradient = jax.value_and_grad(sketched)(normal(*shape))
    wanted_value, wanted = jax.value_and_grad(loss(lambda p: model(p, x)))(
        normal(*shape)
    )
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    project = basis[..., None, :, :] @ basis[..., None, :, :].mT
    wanted = view.from_matrix(project @ view.to_matrix(wanted), shape)
    scale = jnp.abs(wanted).max()
    np.testing.assert_allclose(gradient / scale, wanted / scale, atol=1e-5)


def test_coordinates_are_in_the_order_of_the_leaf(flipped):
    model, shape, x = flipped
    params = normal(*shape)
    view = layout(model, params, x)[""]
    basis = orthonormal(view, shape)
    *batch, taps, _, d_out = view.matrix_shape(shape)
    thin = normal(*batch, taps, 2, d_out, seed=4)

    def visit(product, x, w, extra):
        basis, thin = extra
        change = product.expand(product.compress(x, basis), product.operand(thin))
        return product(x, w) + change, None

    merged = params + view.from_matrix(basis[..., None, :, :] @ thin, shape)
    out = run(model, visit, params, x, (basis, thin))
    np.testing.assert_allclose(out, model(merged, x), rtol=1e-4, atol=1e-4)


def test_a_transposed_convolution_that_flips_its_kernel():
    model = nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True)
    params = model.init(jax.random.key(0), IMAGE)
    view = layout(model.apply, params, IMAGE)["params/kernel"]
    assert view.window_axes(4) == (0, 1)
    out, seen = capture_activations(model.apply)(params, IMAGE)
    np.testing.assert_allclose(out, model.apply(params, IMAGE), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(
        seen["params/kernel"].inputs, IMAGE.reshape(-1, IMAGE.shape[-1])
    )


@pytest.mark.slow
def test_training_of_a_flipped_kernel():
    loss = lambda p, x: jnp.mean((x @ p["w"][::-1, ::-1]) ** 2)
    params, x = {"w": normal(16, 16)}, normal(64, 16, seed=1)
    wanted = np.asarray(jax.jit(jax.grad(loss))(params, x)["w"])
    backprop = spectral_backprop(loss, rank=4)
    state = jax.jit(backprop.init)(params, x, key=jax.random.key(0))
    _, grads, _ = jax.jit(backprop.value_and_grad)(params, state, x)
    basis = np.asarray(state.columns.activation.tracked["input"]["w"].basis.vectors)
    projected = basis @ (basis.T @ wanted)
    np.testing.assert_allclose(grads["w"], projected, atol=1e-5)

    coordinates = spectral_coordinates(loss, rank=4, tracking=0)
    coords, frame = jax.jit(coordinates.init)(params, x, key=jax.random.key(0))
    _, grads = jax.jit(coordinates.value_and_grad)(coords, frame, x)
    basis = np.asarray(frame.columns.activation.tracked["input"]["w"].basis.vectors)
    np.testing.assert_allclose(grads["w"], basis.T @ wanted, atol=1e-5)
    # The inputs' covariance is that of the leaf's own order.
    _, seen = capture_activations(loss)(params, x)
    np.testing.assert_array_equal(seen["w"].inputs, x[:, ::-1])
