"""Which leaves are matrices: one gate for whatever an optimizer may be handed.

A tree of parameters holds biases, holes, functions, Python numbers, complex and empty
arrays as well; optax hands `init` placeholders. What passes here is a floating-point
array with entries that a layout, or else its shape, shows as a stack of matrices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from dsbp_jax.layers import (
    Layout,
    MatrixView,
    guess_view,
    leaves_by_path,
    require_paths,
)

#: How leaves are matrices: views, a function from params to them, or by the shapes.
LayoutLike = Layout | Callable[[optax.Params], Layout] | None


def check_layout(layout: Any) -> None:
    """Raises unless this is a layout, a function to one, or None."""
    if not (layout is None or callable(layout) or isinstance(layout, Layout)):
        raise ValueError(
            "layout must be a dsbp_jax.Layout, a function from params to one, or "
            f"None, got {layout!r}"
        )


def array_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path; what has no shape and dtype (functions, numbers) is left out."""
    leaves = leaves_by_path(tree)
    is_array = lambda leaf: hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return {path: leaf for path, leaf in leaves.items() if is_array(leaf)}


def matrix_views(params: optax.Params, layout: LayoutLike) -> dict[str, MatrixView]:
    """The matrix view of every leaf that is a floating-point matrix with entries.

    Args:
      params: The params, or updates of their shape.
      layout: The views, a function from params to them, or None to go by the shapes.

    Returns:
      A dict from canonical path to view.

    Raises:
      ValueError: The layout names no leaf of the params.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "f": jnp.tanh}
      >>> matrix_views(params, None)
      {'kernel': MatrixView(input_axes=(0,), output_axes=(1,), batch_axes=())}
    """
    layout = layout(params) if callable(layout) else layout
    leaves = array_leaves(params)
    if layout and leaves and not any(path in leaves for path in layout):
        # A masked tree may lack some leaves; the wrong tree lacks all.
        require_paths(list(layout)[:1], leaves, "params")
    views = {}
    for path, leaf in leaves.items():
        view = guess_view(leaf.shape) if layout is None else layout.get(path)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        if view is not None and floating and math.prod(leaf.shape):
            views[path] = view
    return views


@functools.cache
def _placeholder() -> type:
    """The class that optax.tree.map_params calls `init` with; it has no public name."""
    seen: list[type] = []
    optax.tree.map_params(lambda params: seen.append(type(params)), lambda x: x, None)
    return seen[0]


def is_placeholder(params: Any) -> bool:
    """Whether these are the params with which optax.tree.map_params calls `init`.

    It wants a state in which whatever holds no copy of the params is a leaf.

    Example:
      >>> is_placeholder({}), is_placeholder(None)
      (False, False)
    """
    return isinstance(params, _placeholder())
