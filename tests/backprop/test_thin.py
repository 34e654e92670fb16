"""Kernels held by thin variables: `W + VS` at S = 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax.backprop import thin
from tests.layers.models import normal
from tests.layers.traces import find

MODELS = {
    "dense": (lambda p, x: x @ p, (6, 4), (5, 6)),
    "transposed": (lambda p, x: x @ p.T, (4, 6), (5, 6)),
    "heads": (lambda p, x: jnp.einsum("bd,hdk->bhk", x, p), (2, 6, 3), (5, 6)),
    "experts": (lambda p, x: jnp.einsum("ebd,edk->ebk", x, p), (3, 6, 4), (3, 5, 6)),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(x, p, (1,), "SAME"),  # NCW, OIW
        (4, 6, 3),
        (2, 6, 5),
    ),
}


@pytest.fixture(params=MODELS)
def held(request):
    """A site, its kernel, three columns and a thin variable that is not zero."""
    model, shape, x = MODELS[request.param]
    kernel = normal(*shape)
    sites, _ = find(model, kernel, normal(*x, seed=1))
    site = sites[""]
    *batch, taps, d_in, d_out = site.view.matrix_shape(shape)
    basis = jnp.linalg.qr(normal(*batch, d_in, 3, seed=2))[0]
    return site, kernel, basis, normal(*batch, taps, 3, d_out, seed=3)


def close(actual, wanted):
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_changes_nothing(held, dtype):
    site, kernel, basis, variable = held
    kernel = kernel.astype(dtype)
    zero = thin.zero(site, kernel, basis)
    assert zero.shape == variable.shape
    change = thin.expand(site, basis, zero, kernel)
    assert change.dtype == zero.dtype == dtype
    np.testing.assert_array_equal(change, jnp.zeros_like(kernel))


def test_expanding_is_a_product_with_the_columns(held):
    site, kernel, basis, variable = held
    matrix = site.view.to_matrix(thin.expand(site, basis, variable, kernel))
    close(matrix, basis[..., None, :, :] @ variable)
    inside = basis.mT[..., None, :, :] @ matrix
    close(inside, variable)


def test_a_held_kernel_is_the_kernel_whatever_the_variable(held):
    site, kernel, basis, variable = held
    np.testing.assert_array_equal(thin.hold(site, kernel, basis, variable), kernel)


def test_it_moves_along_the_columns(held):
    site, kernel, basis, variable = held
    change, d_basis = normal(*kernel.shape, seed=4), normal(*basis.shape, seed=5)
    run = lambda kernel, basis, s: thin.hold(site, kernel, basis, s)
    zero = jnp.zeros_like(variable)
    tangents = {
        "both": (change, jnp.zeros_like(basis), variable),
        "columns": (jnp.zeros_like(change), d_basis, zero),
    }
    moved = {
        name: jax.jvp(run, (kernel, basis, zero), given)[1]
        for name, given in tangents.items()
    }
    close(moved["both"], change + thin.expand(site, basis, variable, kernel))
    np.testing.assert_array_equal(moved["columns"], jnp.zeros_like(kernel))


def test_the_gradient_by_the_variable_is_that_of_the_kernel_in_the_columns(held):
    site, kernel, basis, variable = held
    loss = lambda kernel: jnp.sum(jnp.sin(kernel))
    of_both = lambda kernel, s: loss(thin.hold(site, kernel, basis, s))
    by_kernel, by_variable = jax.grad(of_both, (0, 1))(kernel, variable)
    wanted = jax.grad(loss)(kernel)
    np.testing.assert_array_equal(by_kernel, wanted)
    close(by_variable, basis.mT[..., None, :, :] @ site.view.to_matrix(wanted))


def test_a_constant_is_not_differentiated():
    sites, _ = find(lambda p, x: x @ p, normal(6, 4), normal(5, 6))
    kernel, basis, variable = normal(6, 4), jnp.eye(6, 3), normal(3, 4)
    by_scale = jax.grad(
        lambda a: jnp.sum(thin.hold(sites[""], kernel, a * basis, variable))
    )(2.0)
    assert by_scale == 0
