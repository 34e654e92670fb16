"""Keeping control flow scalar under `vmap`."""

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def _max_over_batch(x: jax.Array) -> jax.Array:
    return x


@_max_over_batch.def_vmap
def _max_over_batch_rule(axis_size: int, in_batched: list, x: jax.Array) -> tuple:
    del axis_size
    (batched,) = in_batched
    # Called again, so that an outer vmap is reduced as well.
    return _max_over_batch(jnp.max(x, axis=0) if batched else x), False


def unbatched_max(x: jax.Array) -> jax.Array:
    """The identity, except under `vmap`, where it is the maximum over the batch.

    A `lax.cond` or `lax.while_loop` whose predicate is batched runs every branch
    for every element. A predicate that went through this function is shared by
    the whole batch: the work is done if any element asks for it.

    Args:
      x: A scalar, int32 or bool.

    Returns:
      A scalar, int32; not batched even under nested `vmap`.

    Example:
      >>> jax.vmap(unbatched_max, out_axes=None)(jnp.arange(3))
      Array(2, dtype=int32)
    """
    return _max_over_batch(jax.lax.stop_gradient(x.astype(jnp.int32)))
