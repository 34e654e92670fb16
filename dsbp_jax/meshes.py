"""Arrays that are spread over devices: Explicit meshes, and the inside of `shard_map`.

Under an Auto mesh the compiler places every product. Under an Explicit one a
contraction over a sharded axis must say how its result is sharded, which depends
on the user's mesh. The transforms leave that to the compiler as well, and give
updates and state back sharded as they came. Inside `shard_map` the type of an array
says over which axes it varies, and loops must start with the type that they end with.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


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


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mesh axes over which some array of the trees varies, inside `shard_map`.

    Example:
      >>> import jax.numpy as jnp
      >>> varying_axes(jnp.ones(2))
      frozenset()
    """
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(trees) if _is_array(leaf)]
    kinds = [getattr(type_, "manual_axis_type", None) for type_ in types]
    return frozenset[str]().union(*(kind.varying for kind in kinds if kind is not None))


def vary(tree: Any, axes: Iterable[str]) -> Any:
    """The same values, in a type that varies over these axes at least.

    Example:
      >>> import jax.numpy as jnp
      >>> vary({"count": jnp.zeros(())}, frozenset())
      {'count': Array(0., dtype=float32)}
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(set(axes) - varying_axes(leaf))
        if not missing or not _is_array(leaf):
            return leaf
        return jax.lax.pcast(leaf, missing, to="varying")

    return jax.tree.map(cast, tree)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
