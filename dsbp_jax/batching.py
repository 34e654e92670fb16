"""What `vmap` must not do: batch control flow, and LAPACK calls on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one matrix that `vmap` runs matrix by matrix on a CPU.

    There, three batched LAPACK calls that do not depend on each other can wait for
    each other's threads for ever (Cholesky, LU and triangular solves of jaxlib 0.10
    on two cores). Other platforms have batched kernels, and get them.

    Args:
      function: Takes and returns arrays.

    Returns:
      The same function; differentiated, it is batched as ever.

    Example:
      >>> factor = one_by_one(jnp.linalg.cholesky)
      >>> print(jax.vmap(factor)(jnp.array([[[4.0]], [[9.0]]])).ravel())
      [2. 3.]
    """
    in_turn = jax.custom_batching.sequential_vmap(function)

    @jax.custom_jvp
    def call(*args: Any) -> Any:
        return jax.lax.platform_dependent(*args, cpu=in_turn, default=function)

    # The rule of `sequential_vmap` knows no reverse mode.
    @call.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple:
        return jax.jvp(function, primals, tangents)

    return call


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
