"""Which leaf got what and why: the layout of a model, and a table of it."""

from collections.abc import Callable
from typing import Any

from dsbp_jax.layers.finder import trace
from dsbp_jax.layers.views import Layout


def layout(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layout:
    """Reads off a model how each of its parameter leaves is a matrix.

    Args:
      fn: A function `fn(params, *args, **kwargs)` that returns any pytree.
      params: Its parameters; arrays or `jax.ShapeDtypeStruct`s, since nothing
        is computed.
      *args: Its other arguments, likewise.
      **kwargs: Likewise.

    Returns:
      The matrix view of every use of a leaf as a layer, in the order of use.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: x @ params["kernel"].T + params["bias"]
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(2)}
      >>> layout(model, params, jnp.ones((5, 3)))["kernel"]
      MatrixView(input_axes=(1,), output_axes=(0,), batch_axes=())
    """
    sites = trace(fn, params, args, kwargs).sites
    return Layout(tuple((site.name, site.view) for site in sites))
