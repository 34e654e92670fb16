"""Which leaves of a function's arguments and results are arrays, and so traced."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; all others are static, as in a plain call."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_traced(tree: Any) -> bool:
    """Whether arrays of a tree are of a program that is being traced.

    There, calls of one compiled function become as many copies of it.
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def array_leaves(tree: Any) -> list[Any]:
    """The leaves of a tree that are arrays, in flattening order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The array leaves of a tree, and a function that puts others in place."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    # What the arrays were must not outlive the call: they may be tracers.
    static = [_ARRAY if is_array(leaf) else leaf for leaf in leaves]

    def rebuild(values: Iterable[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(
            treedef, [next(rest) if leaf is _ARRAY else leaf for leaf in static]
        )

    return arrays, rebuild


def as_one_program(function: Callable[..., Any], *trees: Any) -> Any:
    """`function(*trees)`, compiled as a whole; what is no array is part of the program.

    One by one, the operations of a pass of a model are hundreds of programs. For what
    is done once: each call compiles anew.
    """
    arrays, rebuild = split_arrays(trees)
    return jax.jit(lambda arrays: function(*rebuild(arrays)))(arrays)


_ARRAY = object()
