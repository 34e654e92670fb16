"""What columns follow in a pass of the model, and their refresh from it.

Of a layer with few rows neither its covariance nor its gradient is formed: both are
followed through their factors, the rows of X and of Δ.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax.layers import LayerActivations, use_name
from dsbp_jax.tracking import (
    Refresh,
    Signal,
    SpectralState,
    TrackedBasis,
    activation_signal,
    gradient_signal,
    product_signal,
    refresh_due,
)

MAX_ROWS = 1024  # of what a layer saw, kept for a refresh


class Seen(NamedTuple):
    """What columns of one leaf follow, in one pass of the model.

    Attributes:
      inputs: The rows X of each of its uses, the first one first.
      outputs: Δ of the same rows as the first use's, shape `(*batch, n, d_out)`, where
        the gradient is `XᵀΔ` of these and need not be formed.
      gradient: The gradient, shaped like the leaf, where it is not.
    """

    inputs: tuple[LayerActivations, ...]
    outputs: jax.Array | None = None
    gradient: jax.Array | None = None


def refreshed(
    state: SpectralState,
    seen: Mapping[str, Seen],
    signal: Callable[[TrackedBasis, str, Seen], Signal],
    beside: Mapping[str, jax.Array],
) -> SpectralState:
    """The bases of one source, those of the leaves seen refreshed."""
    entries = state.tracked.get("input", {})
    due = {
        path: Refresh(
            entry=entries[path],
            signal=functools.partial(signal, entries[path], path, found),
            turn=place,  # all are due; one after the other, for want of room
            beside=beside.get(path),
        )
        for place, (path, found) in enumerate(seen.items())
        if path in entries
    }
    if not due:
        return state
    new = refresh_due(due, None, num_blocks=2, tolerance=0.0)
    tracked = {**state.tracked, "input": {**entries, **new}}
    return SpectralState(optax.safe_increment(state.count), tracked)


def input_signal(entry: TrackedBasis, path: str, seen: Seen) -> Signal:
    """The covariance of a layer's inputs."""
    found = {use_name(path, use): rows for use, rows in enumerate(seen.inputs)}
    shape = entry.vectors.shape[:-1]
    signal = activation_signal(found, shape, "input", path)
    (rows,), count = signal.arrays, signal.count
    share = _kept(entry, rows.shape[-2])
    if not share:
        return signal
    assert count is not None
    # Rows are divided by their count at the end.
    known = _rows_of(entry, share) * jnp.sqrt(count)[..., None, None]
    rows = jnp.concatenate([(1 - share) ** 0.5 * rows, known], axis=-2)
    return signal._replace(arrays=(rows,))


def outside_signal(entry: TrackedBasis, path: str, seen: Seen) -> Signal:
    """GGᵀ, from the two factors of G where there are some."""
    del path
    if seen.outputs is None:
        assert entry.label is not None
        assert seen.gradient is not None
        return gradient_signal(entry.label.view, seen.gradient, "input")
    share = _kept(entry, seen.outputs.shape[-2])
    known = _rows_of(entry, share) if share else None
    outputs = seen.outputs.astype(jnp.float32) * (1 - share) ** 0.5
    rows, _ = seen.inputs[0].rows("input")
    return product_signal(rows, outputs, known)


def _kept(entry: TrackedBasis, rows: int) -> float:
    """The part of a covariance that a refresh from so many rows keeps."""
    return max(0.0, 1 - rows / entry.vectors.shape[-1])


def _rows_of(entry: TrackedBasis, share: float) -> jax.Array:
    """Rows of the covariance that a basis stands for, times a share of it."""
    values = jnp.maximum(entry.basis.values, 0)
    return jnp.sqrt(share * values)[..., None] * entry.vectors.mT
