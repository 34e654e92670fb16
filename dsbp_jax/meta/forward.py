"""A loss as meta-learning runs it: convolutions that batch, activations on demand."""

from collections.abc import Callable
from typing import Any

import jax

from dsbp_jax.layers import LayerActivations, patches, primitives
from dsbp_jax.layers.capture import collect_rows, gather_rows
from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.rewrite import evaluate
from dsbp_jax.layers.sites import Site
from dsbp_jax.layers.thin import Product

# Where kernels of many tasks are convolved faster as products over patches.
_PATCHES_ON = ("cpu",)
_SIDES = ("inputs", "outputs")


def batchable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A model function whose convolutions `vmap` over kernels does not slow down.

    Args:
      fn: `fn(params, *args, **kwargs)`, differentiated by JAX's own rules.

    Returns:
      The same function; the sums of a convolution may be in another order.

    Example:
      >>> import jax.numpy as jnp
      >>> batchable(lambda params, x: x @ params)(jnp.eye(2), jnp.ones(2)).tolist()
      [1.0, 1.0]
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, params, args, kwargs)
        sites = [site for site in traced.sites if _is_replaced(site)]
        if not sites:
            return fn(params, *args, **kwargs)
        arrays = array_leaves((params, args, kwargs))
        outputs, _ = evaluate(traced, _visit, arrays, sites=sites)
        return traced.unflatten(outputs)

    return run


def capturing(
    fn: Callable[..., Any],
) -> Callable[..., tuple[Any, dict[str, LayerActivations]]]:
    """`dsbp_jax.capture_activations` of `batchable(fn)`, in one evaluation."""

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        traced = trace(fn, params, args, kwargs)

        def visit(
            product: Product, x: jax.Array, w: jax.Array, extra: Any
        ) -> tuple[jax.Array, Any]:
            y, _ = _visit(product, x, w, extra)
            return y, collect_rows(product.site, x, y, _SIDES, None)

        arrays = array_leaves((params, args, kwargs))
        outputs, found = evaluate(traced, visit, arrays, sites=traced.sites)
        activations = {
            site.name: gather_rows(site, found[site.name], _SIDES, None)
            for site in traced.sites
        }
        return traced.unflatten(outputs), activations

    return run


def convolves(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether `vmap` over params meets convolutions that stay, on a CPU."""
    if jax.default_backend() != "cpu":
        return False
    traced = trace(fn, params, args, kwargs)
    replaced = sum(_is_replaced(site) for site in traced.sites)
    found = [
        equation
        for equation in primitives.equations(traced.body.jaxpr)
        if equation.primitive.name == primitives.CONVOLUTION
    ]
    return len(found) > replaced or not all(map(patches.is_product, found))


def _is_replaced(site: Site) -> bool:
    return (
        site.kind == "convolution"
        and site.rule is None
        and jax.default_backend() in _PATCHES_ON
    )


def _visit(
    product: Product, x: jax.Array, w: jax.Array, extra: Any
) -> tuple[jax.Array, None]:
    del extra
    if _is_replaced(product.site):
        return patches.convolve(product, x, w), None
    return product(x, w), None
