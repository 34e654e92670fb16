"""How far a layer's tracked model is from that of the source, and an alarm."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import linalg
from dsbp_jax.linalg import Spiked
from dsbp_jax.tracking import rotation

_TINY = 1e-30
MEASURES = ("mean", "angle", "spectrum")


class Drift(NamedTuple):
    """How far the data are from those of the source.

    Attributes:
      score: Mean excess of all measures over what they are on source batches, in their
        deviations there.  # shape=(), dtype=float32
      threshold: What it exceeds for so small a share of source batches.
        # shape=(), dtype=float32
      alarm: Whether it is exceeded; ends where it is well below.
        # shape=(), dtype=bool
      layers: By layer, each a float32 scalar: `mean`, the shift of the mean in
        deviations of the source; `angle`, the mean squared sine of the principal
        angles between the two bases; `spectrum`, the mean size of the logarithm of the
        ratio of their eigenvalues, the tail's included.
    """

    score: jax.Array
    threshold: jax.Array
    alarm: jax.Array
    layers: dict[str, dict[str, jax.Array]]


def measures(source: Spiked, target: Spiked) -> jax.Array:
    """The three `MEASURES` of one layer, means over the matrices of a stack.

    Args:
      source: Of the source.
      target: Tracked.

    Returns:
      Shape `(3,)`.
    """
    one = _measures
    for _ in source.basis.trace.shape:
        one = jax.vmap(one)
    found = one(source, target)
    return jnp.mean(found.reshape(-1, len(MEASURES)), axis=0)


def of_layers(
    source: Mapping[str, Spiked], target: Mapping[str, Spiked], names: Iterable[str]
) -> jax.Array:
    """The `measures` of some layers, shape `(layers, 3)`."""
    return jnp.stack([measures(source[name], target[name]) for name in names])


def _measures(source: Spiked, target: Spiked) -> jax.Array:
    left, right = source.basis, target.basis
    dim, rank = left.vectors.shape
    floor = 1e-6 * left.trace / dim + _TINY
    values, others = (jnp.maximum(b.values, floor) for b in (left, right))
    flat, other = (jnp.maximum(linalg.tail(b), floor) for b in (left, right))
    shift = target.mean - source.mean
    along = rotation(left.vectors, shift[:, None])[:, 0]
    rest = jnp.maximum(shift @ shift - along @ along, 0)
    mean = jnp.sum(jnp.square(along) / values) + rest / flat * float(dim > rank)
    cosines = rotation(left.vectors, right.vectors)
    # Directions of which nothing is left point anywhere: those with variance count.
    share = values / jnp.sum(values)
    angle = 1 - share @ jnp.sum(jnp.square(cosines), axis=1)
    logs = jnp.abs(jnp.log(others / values))
    ends = jnp.abs(jnp.log(other / flat)) * float(dim > rank)
    spectrum = (jnp.sum(logs) + ends) / (rank + int(dim > rank))
    return jnp.stack([jnp.sqrt(mean / dim), angle, spectrum])


def score_of(found: jax.Array, normal: jax.Array) -> jax.Array:
    """The score of measures `(layers, 3)`, `normal` their mean and deviation."""
    excess = (found - normal[0]) / jnp.maximum(normal[1], 1e-6)
    return jnp.mean(jnp.maximum(excess, 0))


def by_layer(found: jax.Array, names: Any) -> dict[str, dict[str, jax.Array]]:
    """Measures `(layers, 3)` by name."""
    return {
        name: dict(zip(MEASURES, row, strict=True))
        for name, row in zip(names, found, strict=True)
    }
