"""Running a transform on arrays that are sharded over an explicit mesh.

Under an Auto mesh the compiler places every product. Under an Explicit one a
contraction over a sharded axis must say how its result is sharded, which depends
on the user's mesh. The transforms leave that to the compiler as well, and give
updates and state back sharded as they came.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


def with_auto_axes(
    function: Callable[..., Any], *args: Any, out_specs: Callable[[], Any]
) -> Any:
    """Runs a function with its products left to the compiler to place.

    Args:
      function: Takes `args`.
      *args: Pytrees; what is no array is static.
      out_specs: Gives the partition specs of the result, under an Explicit mesh.

    Returns:
      What the function returns.
    """
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return function(*args)
    leaves, structure = jax.tree.flatten(args)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def body(*arrays: jax.Array) -> Any:
        remaining = iter(arrays)
        merged = [
            next(remaining) if array else leaf
            for array, leaf in zip(is_array, leaves, strict=True)
        ]
        return function(*jax.tree.unflatten(structure, merged))

    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return jax.sharding.auto_axes(body, out_sharding=out_specs())(*arrays)


def specs_of(tree: Any) -> Any:
    """The partition specs of a tree of arrays."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def keep_shardings(update_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an optax `update` independent of how its arrays are sharded.

    Args:
      update_fn: `update(updates, state, params=None, **extra_args)`.

    Returns:
      The same function. Under an Explicit mesh its body runs with Auto axes, and
      its results are sharded like `updates` and `state`.
    """

    @functools.wraps(update_fn)
    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        run = lambda updates, state, params, extra: update_fn(
            updates, state, params, **extra
        )
        specs = lambda: specs_of((updates, state))
        return with_auto_axes(run, updates, state, params, extra_args, out_specs=specs)

    return update
