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


@jax.jit  # traced once for all leaves of a shape, like the two below
def packed(entry: TrackedBasis) -> Packed:
    """A tracked basis without its label, packed."""
    single = entry.basis.trace, entry.drift, entry.refreshes, entry.failures
    columns = [number.astype(jnp.float32)[..., None] for number in single]
    *batch, rank = entry.basis.values.shape
    rest = jnp.zeros((*batch, -(rank + len(single)) % _LINE), jnp.float32)
    numbers = jnp.concatenate([entry.basis.values, *columns, rest], axis=-1)
    return Packed(entry.vectors, numbers)


@jax.jit
def unpacked(packed: Packed) -> TrackedBasis:
    """The inverse of `packed`."""
    rank = packed.vectors.shape[-1]
    single = [packed.numbers[..., rank + place] for place in range(4)]
    trace, drift, refreshes, failures = single
    basis = EigenBasis(packed.vectors, packed.numbers[..., :rank], trace)
    count = lambda number: number.astype(jnp.int32)
    return TrackedBasis(basis, drift, count(refreshes), count(failures))
