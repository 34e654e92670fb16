"""Arrays of one shape in stacks, such that the compiler sees equal loops.

What is left to compile of many leaves are loops over entries: copies into a stack and
out of it. XLA compiles equal ones once, but those that differ by a constant one by one;
so the places in a stack are numbers that it does not know.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


@jax.jit
def unstacked(stacked: T, place: jax.Array) -> T:
    """One entry of stacked arrays.

    Args:
      stacked: A pytree of arrays `(m, …)`.
      place: The number of the entry, shape `()`, int32, from 0 to m − 1.

    Returns:
      The same pytree of arrays `(…)`.

    Example:
      >>> unstacked((jnp.array([3.0, 4.0]),), jnp.int32(1))
      (Array(4., dtype=float32),)
    """
    take = lambda x: jax.lax.dynamic_index_in_dim(
        x, place, keepdims=False, allow_negative_indices=False
    )
    return jax.tree.map(take, stacked)


def places(flag: jax.Array, size: int) -> list[jax.Array]:
    """The numbers below `size`, hidden from the compiler.

    A barrier is not enough: numbers are constants again when loops are compiled.

    Args:
      flag: Always set, which the compiler cannot know; shape `()`, bool. (Where it is
        not, all places are the first.)
      size: How many.

    Returns:
      Scalars, int32.

    Example:
      >>> [place.item() for place in places(jnp.array(True), 3)]
      [0, 1, 2]
    """
    if size == 1:
        return [jnp.int32(0)]
    return jax.lax.cond(
        flag,
        lambda: [jnp.int32(number) for number in range(size)],
        lambda: [jnp.int32(0)] * size,
    )
