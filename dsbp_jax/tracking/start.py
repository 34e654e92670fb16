"""Where tracking starts: random bases, all of a shape drawn by one program."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dsbp_jax import linalg
from dsbp_jax.layers import is_traced
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.tracked_basis import Label, TrackedBasis

K = TypeVar("K")


class Start(NamedTuple):
    """What a basis starts from.

    Attributes:
      label: Of what it is to be.
      rank: Its columns.
      number: What tells its draw from others; below 2³².
    """

    label: Label
    rank: int
    number: int


def start_all(
    starts: Mapping[K, Start], draw: Callable[[jax.Array], jax.Array]
) -> dict[K, TrackedBasis]:
    """Random orthonormal bases.

    Args:
      starts: By any key.
      draw: The PRNG key for a number.

    Returns:
      Their entries; those of a stack begin alike.
    """
    groups: dict[tuple[int, int], list[K]] = {}
    for name, one in starts.items():
        form = one.label.dims[one.label.side], one.rank
        groups.setdefault(form, []).append(name)
    vectors: dict[K, jax.Array] = {}
    for form, names in groups.items():
        numbers = [starts[name].number for name in names]
        vectors.update(zip(names, _drawn(form, numbers, draw), strict=True))
    return {name: _entry(one, vectors[name]) for name, one in starts.items()}


def _drawn(
    form: tuple[int, int], numbers: list[int], draw: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """Vectors for each number, by one program, or one loop inside of another."""
    start = lambda number: linalg.init_basis(*form, key=draw(number)).vectors
    if is_traced(draw(jnp.uint32(numbers[0]))):
        return list(jax.lax.map(start, jnp.array(numbers, jnp.uint32)))
    return [start(jnp.uint32(number)) for number in numbers]


def _entry(start: Start, vectors: jax.Array) -> TrackedBasis:
    batch = start.label.view.matrix_shape(start.label.shape)[:-3]
    basis = EigenBasis(
        jnp.broadcast_to(vectors, (*batch, *vectors.shape)),
        jnp.zeros((*batch, start.rank), jnp.float32),
        jnp.zeros(batch, jnp.float32),
    )
    # Three arrays of their own: one buffer cannot be donated twice.
    return TrackedBasis(
        basis=basis,
        drift=jnp.zeros(batch, jnp.float32),
        refreshes=jnp.zeros(batch, jnp.int32),
        failures=jnp.zeros(batch, jnp.int32),
        label=start.label,
    )
