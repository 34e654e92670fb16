"""Four shifts of source data, by which layers are chosen before any stream is seen.

They stand for shifts in general: noise, smoothing, saturation, stains. Streams that a
method is judged by should have none of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Shift = Callable[[jax.Array, jax.Array, "Range"], jax.Array]


class Range(NamedTuple):
    """Least and greatest value of each feature in a batch, shape `(channels,)`."""

    low: jax.Array
    high: jax.Array


def speckle_noise(x: jax.Array, key: jax.Array, span: Range) -> jax.Array:
    """Noise in proportion to each value."""
    return x * (1 + 0.6 * jax.random.normal(key, x.shape, x.dtype))


def gaussian_blur(x: jax.Array, key: jax.Array, span: Range) -> jax.Array:
    """Images `(n, height, width, channels)`, smoothed; other arrays as they are."""
    if x.ndim != 4:
        return x
    for axis in (1, 2):
        size = x.shape[axis]
        at = jnp.arange(size, dtype=jnp.float32)
        weights = jnp.exp(-0.5 * jnp.square((at[:, None] - at) / (size / 18)))
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        x = jnp.moveaxis(jnp.tensordot(x, weights.astype(x.dtype), (axis, 1)), -1, axis)
    return x


def saturation(x: jax.Array, key: jax.Array, span: Range) -> jax.Array:
    """Channels apart from their mean; one channel alone is brightened."""
    grey = jnp.mean(x, axis=-1, keepdims=True) if x.shape[-1] > 1 else 0
    return grey + 2.5 * (x - grey)


def spatter(x: jax.Array, key: jax.Array, span: Range) -> jax.Array:
    """Stains of one value: of images over patches, else over single features."""
    keys = jax.random.split(key)
    coarse = x.shape
    if x.ndim == 4:
        coarse = (len(x), -(-x.shape[1] // 4), -(-x.shape[2] // 4), 1)
    stained = jax.random.bernoulli(keys[0], 0.2, coarse)
    if x.ndim == 4:
        stained = jnp.repeat(jnp.repeat(stained, 4, axis=1), 4, axis=2)
        stained = stained[:, : x.shape[1], : x.shape[2]]
    return jnp.where(stained, jnp.asarray(0.7, x.dtype), x)


SHIFTS: dict[str, Shift] = {
    one.__name__: one for one in (speckle_noise, gaussian_blur, saturation, spatter)
}


def shifted(name: str, x: jax.Array, key: jax.Array, span: Range) -> jax.Array:
    """Source data under one of `SHIFTS`, which works on [0, 1], within their range."""
    width = jnp.maximum(span.high - span.low, 1e-30)
    found = SHIFTS[name]((x - span.low) / width, key, span)
    return span.low + jnp.clip(found, 0, 1) * width
