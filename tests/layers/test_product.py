"""Thin products, against the same model with its leaf projected."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax.layers.product import Product
from tests.layers.models import normal
from tests.layers.traces import visits

pytestmark = pytest.mark.usefixtures("strict_promotion")


def convolution(*layout):
    return lambda p, x: lax.conv_general_dilated(
        x, p, (1, 2), "SAME", rhs_dilation=(2, 1), dimension_numbers=layout
    )


MODELS = {
    "dense": (lambda p, x: x @ p, (4, 3), (5, 4)),
    "transposed": (lambda p, x: x @ p.T, (3, 4), (5, 4)),
    "left operand": (lambda p, x: p @ x, (3, 4), (4, 5)),
    "features in another order": (
        lambda p, x: jnp.einsum("bhd,dhk->bk", x, p),
        (2, 3, 5),
        (4, 3, 2),
    ),
    "reversed": (lambda p, x: x @ p[::-1], (4, 3), (5, 4)),
    "experts": (
        lambda p, x: jnp.einsum("bed,edk->bek", x, p),
        (2, 4, 3),
        (5, 2, 4),
    ),
    "experts, last": (
        lambda p, x: jnp.einsum("ebd,dke->kbe", x, p),
        (4, 3, 2),
        (2, 5, 4),
    ),
    "NHWC": (convolution("NHWC", "HWIO", "NHWC"), (3, 2, 4, 3), (2, 5, 6, 4)),
    "NCHW": (convolution("NCHW", "OIHW", "NCHW"), (3, 4, 3, 2), (2, 4, 5, 6)),
    "mixed": (convolution("HWNC", "IHWO", "NCHW"), (4, 3, 2, 3), (5, 6, 2, 4)),
}


class Case(NamedTuple):
    """A model of one product, and what that saw."""

    model: Any
    leaf: jax.Array
    given: jax.Array  # the model's own input
    product: Product
    x: jax.Array
    w: jax.Array
    y: jax.Array

    def basis(self, rank):
        site = self.product.site
        *batch, _, d_in, _ = site.view.matrix_shape(site.shape)
        square = normal(*batch, d_in, d_in, seed=2)
        return jnp.linalg.qr(square)[0][..., :rank]


@pytest.fixture(params=MODELS)
def case(request):
    model, shape, x = MODELS[request.param]
    leaf, given = normal(*shape), normal(*x, seed=1)
    return Case(model, leaf, given, *visits(model, leaf, given)[""])


def close(actual, wanted):
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-5)


def test_a_full_basis_gives_the_equation(case):
    basis = case.basis(None)
    thin = case.product.restrict(case.w, basis)
    close(case.product.expand(case.product.compress(case.x, basis), thin), case.y)


def test_a_thin_basis_gives_the_response_of_the_projected_leaf(case):
    basis, view = case.basis(2), case.product.site.view
    wide = basis[..., None, :, :]
    thin = wide.mT @ view.to_matrix(case.leaf)
    projected = view.from_matrix(wide @ thin, case.leaf.shape)
    wanted = visits(case.model, projected, case.given)[""].y
    compressed = case.product.compress(case.x, basis)
    for weight in (case.product.restrict(case.w, basis), case.product.operand(thin)):
        close(case.product.expand(compressed, weight), wanted)


def test_what_is_compressed_is_the_rows_times_the_basis(case):
    basis, site = case.basis(2), case.product.site
    wanted = site.inputs.to_rows(case.x) @ basis
    compressed = case.product.compress(case.x, basis)
    if site.kind == "convolution":
        first, channel, *space = case.product.equation.params["dimension_numbers"][0]
        compressed = compressed.transpose(first, *space, channel)
    close(compressed.reshape(wanted.shape), wanted)


def test_the_derivative_by_the_thin_weight_is_that_of_the_leaf_restricted(case):
    product, basis = case.product, case.basis(2)
    thin = jnp.zeros_like(product.restrict(case.w, basis))
    loss = lambda response: jnp.sum(jnp.sin(response))
    sketched = lambda x, w, thin: loss(product.sketched(x, w, basis, thin))
    exact = lambda x, w: loss(product(x, w))
    by_x, by_w, by_thin = jax.grad(sketched, (0, 1, 2))(case.x, case.w, thin)
    wanted_x, wanted_w = jax.grad(exact, (0, 1))(case.x, case.w)
    close(product.sketched(case.x, case.w, basis, thin), case.y)
    close(by_x, wanted_x)
    close(by_thin, product.restrict(wanted_w, basis))
    assert not np.any(by_w)


# Parts of a kernel


@pytest.mark.parametrize("channels_last", [True, False])
def test_summands_of_a_convolution_add_up(channels_last):
    layout = ("NWC", "WIO", "NWC") if channels_last else ("NCW", "OIW", "NCW")
    axis = layout[1].index("I")
    sizes = lambda i: [dict(W=3, I=i, O=5)[name] for name in layout[1]]
    params = {"a": normal(*sizes(4)), "b": normal(*sizes(2), seed=1)}
    x = normal(*(dict(N=2, W=7, C=6)[name] for name in layout[0]), seed=2)
    model = lambda p, x: lax.conv_general_dilated(
        x, jnp.concatenate([p["a"], p["b"]], axis), (1,), "SAME", None, None, layout
    )
    _assert_summands_add_up(model, params, x)


@pytest.mark.parametrize("left", [True, False])
def test_summands_of_a_matrix_product_add_up(left):
    params, x = {"a": normal(4, 3), "b": normal(2, 3, seed=1)}, normal(5, 6, seed=2)
    joint = lambda p: jnp.concatenate([p["a"], p["b"]])
    model = lambda p, x: joint(p).T @ x.T if left else x @ joint(p)
    _assert_summands_add_up(model, params, x)


def _assert_summands_add_up(model, params, x):
    seen = visits(model, params, x)
    assert list(seen) == ["a", "b"]
    parts = []
    for product, x_seen, w, _ in seen.values():
        alone = dataclasses.replace(product, response=None)
        parts.append(alone(*product.summand(x_seen, w)))
    close(parts[0] + parts[1], model(params, x))
    close(parts[0], model(params | {"b": jnp.zeros_like(params["b"])}, x))


def test_parts_of_a_kernel_have_no_sketch():
    model = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]])
    params = {"a": normal(2, 3), "b": normal(2, 3, seed=1)}
    product, x, w, _ = visits(model, params, normal(5, 4))["a"]
    with pytest.raises(ValueError, match="'a' is part of a fused kernel"):
        product.sketched(x, w, jnp.eye(2), w[:2])


def test_a_response_that_is_known_is_not_run_again():
    product, x, w, y = visits(lambda p, x: x @ p, normal(4, 3), normal(5, 4))[""]
    known = Product(product.site, product.equation, y)
    assert known(x, w) is y
