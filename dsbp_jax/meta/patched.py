"""A loss as meta-learning runs it: convolutions that batch, activations on demand."""

from collections.abc import Callable
from typing import Any

import jax

from dsbp_jax.layers import (
    LayerActivations,
    Product,
    Site,
    array_leaves,
    capture_through,
    convolve,
    evaluate,
    is_product,
    trace,
)


def with_patches(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A model function whose convolutions `vmap` over kernels does not slow down.

    On a CPU, those of params run as matrix products over patches, at the price of
    memory: the patches of a k × k kernel are up to k² times its input. Elsewhere, and
    inside of derivative rules of the user's own, they run as they stand.

    Args:
      fn: `fn(params, *args, **kwargs)`.

    Returns:
      The same function; the sums of a convolution may be in another order.

    Example:
      >>> import jax.numpy as jnp
      >>> with_patches(lambda params, x: x @ params)(jnp.eye(2), jnp.ones(2)).tolist()
      [1.0, 1.0]
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on_cpu():
            return fn(params, *args, **kwargs)
        traced = trace(fn, params, args, kwargs)
        sites = [site for site in traced.sites if _is_replaced(site)]
        arrays = array_leaves((params, args, kwargs))
        if not sites:
            return traced.run(arrays)
        visit = lambda product, x, w, extra: (_respond(product, x, w), None)
        outputs, _ = evaluate(traced, visit, arrays, sites=sites)
        return traced.unflatten(outputs)

    return run


def with_activations(
    fn: Callable[..., Any],
) -> Callable[..., tuple[Any, dict[str, LayerActivations]]]:
    """`dsbp_jax.capture_activations` of `with_patches(fn)`, in one evaluation."""
    return capture_through(fn, _respond)


def keeps_convolutions(
    fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> bool:
    """Whether some convolution runs as it stands, on a CPU."""
    if not _on_cpu():
        return False
    traced = trace(fn, params, args, kwargs)
    # Several leaves may be parts of the kernel of one convolution.
    replaced = len({site.key for site in traced.sites if _is_replaced(site)})
    found = traced.convolutions()
    return len(found) > replaced or not all(map(is_product, found))


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _is_replaced(site: Site) -> bool:
    return site.kind == "convolution" and site.rule is None and _on_cpu()


def _respond(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    if _is_replaced(product.site):
        return convolve(product, x, w)
    return product(x, w)
