"""A tracked basis in two arrays: what goes into stacks, and out of them again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.tracked_basis import TrackedBasis

_LINE = 128


class Packed(NamedTuple):
    """A tracked basis in two arrays, as the loops handle it.

    Each array costs a loop to compile for each shape, and a copy for each leaf.

    Attributes:
      vectors: The vectors, shape `(*batch, d, k)`.
      numbers: Values, trace, drift, refreshes and failures, float32, which counts to
        2²⁴; zeros up to a multiple of 128, since copies of less are compiled one by
        one. Shape `(*batch, n)`.
    """

    vectors: jax.Array
    numbers: jax.Array


@jax.jit  # traced once for all leaves of a shape, like its inverse
def packed(entry: TrackedBasis) -> Packed:
    """A tracked basis in two arrays.

    Args:
      entry: The basis, or a stack of them; without its label.

    Returns:
      The same, packed.

    Example:
      >>> basis = EigenBasis(jnp.eye(3, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> entry = TrackedBasis(basis, jnp.array(0.5), jnp.int32(2), jnp.int32(0))
      >>> unpacked(packed(entry)).refreshes
      Array(2, dtype=int32)
    """
    single = entry.basis.trace, entry.drift, entry.refreshes, entry.failures
    columns = [number.astype(jnp.float32)[..., None] for number in single]
    *batch, rank = entry.basis.values.shape
    rest = jnp.zeros((*batch, -(rank + len(single)) % _LINE), jnp.float32)
    numbers = jnp.concatenate([entry.basis.values, *columns, rest], axis=-1)
    return Packed(entry.vectors, numbers)


@jax.jit
def unpacked(pack: Packed) -> TrackedBasis:
    """The inverse of `packed`.

    Args:
      pack: What it gave, or a stack of that.

    Returns:
      The tracked basis, without a label.
    """
    rank = pack.vectors.shape[-1]
    single = [pack.numbers[..., rank + place] for place in range(4)]
    trace, drift, refreshes, failures = single
    basis = EigenBasis(pack.vectors, pack.numbers[..., :rank], trace)
    count = lambda number: number.astype(jnp.int32)
    return TrackedBasis(basis, drift, count(refreshes), count(failures))
