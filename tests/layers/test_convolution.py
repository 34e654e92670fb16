"""Convolutions as products over patches, against the convolutions themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.layers.convolution import convolve
from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.rewrite import evaluate
from tests.layers.models import normal

CASES = {
    "one by one": dict(window=(1, 1)),
    "same": dict(window=(3, 3)),
    "valid": dict(window=(3, 2), padding="VALID"),
    "strided": dict(window=(3, 3), strides=(2, 2)),
    "uneven strides": dict(window=(2, 3), strides=(3, 2), padding="VALID"),
    "dilated": dict(window=(3, 2), rhs_dilation=(2, 3), strides=(1, 2)),
    "cut off": dict(window=(3, 3), padding=((-1, 2), (0, -2))),
    "stride over window": dict(window=(1, 2), strides=(3, 3), padding="VALID"),
    "channels first": dict(window=(3, 3), layout=("NCHW", "OIHW", "NCHW")),
    "mixed axes": dict(window=(3, 3), layout=("HWNC", "IHWO", "NCHW")),
    "sequence": dict(window=(4,), strides=(3,), layout=("NWC", "WIO", "NWC")),
}


def problem(
    window, layout=("NHWC", "HWIO", "NHWC"), padding="SAME", strides=None, **kw
):
    """A convolution of one kernel, with its params and input."""
    sizes = dict(N=2, C=3, H=9, W=10, I=3, O=4)
    taps = dict(zip("HW" if len(window) == 2 else "W", window, strict=True))
    shape = [sizes[name] for name in layout[0]]
    kernel = [{**sizes, **taps}[name] for name in layout[1]]

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            strides or (1,) * len(window),
            padding,
            dimension_numbers=layout,
            **kw,
        )

    return fn, {"w": normal(*kernel)}, normal(*shape, seed=1)


def as_products(fn):
    """`fn` with its convolutions done as matrix products."""

    def run(*args):
        traced = trace(fn, args[0], args[1:], {})
        assert traced.sites
        visit = lambda product, x, w, extra: (convolve(product, x, w), None)
        outputs, _ = evaluate(traced, visit, array_leaves(args))
        return traced.unflatten(outputs)

    return run


@pytest.mark.parametrize("case", CASES)
def test_equals_the_convolution(case):
    fn, params, x = problem(**CASES[case])
    expected, actual = fn(params, x), jax.jit(as_products(fn))(params, x)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)
    program = jax.make_jaxpr(as_products(fn))(params, x)
    assert "conv_general_dilated" not in str(program)


def test_gradients_agree_under_vmap_over_kernels():
    fn, params, x = problem((3, 3), strides=(2, 2))
    kernels = normal(3, *params["w"].shape, seed=2)
    loss = lambda fn: lambda w, x: jnp.sum(jnp.sin(fn({"w": w}, x)))
    grads = lambda fn: jax.jit(jax.vmap(jax.grad(loss(fn), (0, 1)), (0, None)))
    for actual, expected in zip(
        grads(as_products(fn))(kernels, x), grads(fn)(kernels, x), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_dilated_input_runs_as_it_stands():
    fn, params, x = problem((3, 3), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2))
    program = jax.make_jaxpr(as_products(fn))(params, x)
    assert "conv_general_dilated" in str(program)
    np.testing.assert_array_equal(as_products(fn)(params, x), fn(params, x))
