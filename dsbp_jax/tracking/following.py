"""Bases of the updates themselves, followed without lag.

A basis that an update is filtered with has to be this update's: what is one refresh
old leaves drifting singular values up. So here the refresh is a power step whose
products the filter uses again, three with the kernel in all, and two where no refresh
is due. `refresh` is for whatever else is followed.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import linalg
from dsbp_jax.batching import unbatched_max
from dsbp_jax.layers import MatrixView
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.stacks import places, unstacked
from dsbp_jax.tracking.eigenspace import wide
from dsbp_jax.tracking.leaves import array_leaves
from dsbp_jax.tracking.packing import Packed, packed, unpacked
from dsbp_jax.tracking.tracked_basis import TrackedBasis
from dsbp_jax.tracking.tracker import SpectralState, Tracker, check_refresh

# Power steps from a random start.
_COLD_STEPS = 8


class Followed(NamedTuple):
    """Some updates of one shape, and the leading parts of them.

    Attributes:
      paths: The leaves, m of them.
      views: How they are matrices.
      matrices: The updates, m of shape `(*batch, a, b)`.
      numbers: The place of each in the stacks below, m scalars, int32.
      traces: Their squared norms, shape `(m, *batch)`.
      leading: Their leading parts, with m in front of every shape: `thin` over the
        norms, `values` over the squared norms.
      side: On which side the vectors are.
      kind: What `kind` gave for their paths.
    """

    paths: tuple[str, ...]
    views: tuple[MatrixView, ...]
    matrices: tuple[jax.Array, ...]
    numbers: Sequence[jax.Array]
    traces: jax.Array
    leading: linalg.Leading
    side: str
    kind: Hashable


def as_matrices(view: MatrixView, leaf: jax.Array) -> jax.Array:
    """A leaf as `(*batch, a, b)` in float32 or wider, taps and inputs together."""
    matrix = view.to_matrix(leaf)
    *batch, window, d_in, d_out = matrix.shape
    return matrix.reshape(*batch, window * d_in, d_out).astype(wide(leaf.dtype))


def squared_norm(matrix: jax.Array) -> jax.Array:
    """The squared norms of matrices `(*batch, a, b)`."""
    return jnp.sum(jnp.square(matrix), axis=(-2, -1))


def follow_updates(
    tracker: Tracker,
    state: SpectralState,
    updates: optax.Updates,
    *,
    refresh: bool | None = None,
    kind: Callable[[str], Hashable] = lambda path: None,
) -> tuple[SpectralState, list[Followed]]:
    """Refreshes what is due, and splits each tracked update at its basis.

    Args:
      tracker: Of side `"singular"`.
      state: The state of the last step.
      updates: What is followed.
      refresh: As for `Tracker.update`.
      kind: A function of a path; leaves for which it differs are kept apart.

    Returns:
      The new state, and the tracked leaves: those of one kind and shape that are due
      together share what is not a product with them, and so a program.

    Raises:
      ValueError: A leaf has another shape than in `init`, or bases another rank.
    """
    check_refresh(refresh)
    leaves = array_leaves(updates)
    turns, now = tracker.turns(state)
    groups: dict[tuple, list[tuple[str, TrackedBasis, jax.Array]]] = {}
    for (side, path), entry in tracker.present(state, leaves).items():
        assert entry.label is not None
        rank = entry.vectors.shape[-1]
        if rank != tracker.rank:
            raise ValueError(
                f"rank must be {rank}, that of the state's basis of {path!r}, got "
                f"{tracker.rank}"
            )
        matrix = as_matrices(entry.label.view, leaves[path])
        form = side, matrix.shape, matrix.dtype, turns[side, path], kind(path)
        groups.setdefault(form, []).append((path, entry, matrix))

    tracked = {side: dict(found) for side, found in state.tracked.items()}
    parts = []
    for (side, _, _, turn, one), members in groups.items():
        due: jax.Array | None = now == turn
        if refresh is not None:
            due = jnp.array(True) if refresh else None
        paths, entries, matrices = zip(*members, strict=True)
        numbers = places(unbatched_max(state.count) >= 0, len(paths))
        numbers = vary(numbers, varying_axes(matrices, entries))
        new, traces, leading = _follow(matrices, entries, due, side)
        labels = [entry.label for entry in entries]
        for path, label, number in zip(paths, labels, numbers, strict=True):
            entry = unpacked(unstacked(new, number))
            tracked[side][path] = entry._replace(label=label)
        views = tuple(label.view for label in labels)
        found = Followed(paths, views, matrices, numbers, traces, leading, side, one)
        parts.append(found)
    return SpectralState(optax.safe_increment(state.count), tracked), parts


def _follow(
    matrices: Sequence[jax.Array],
    entries: Sequence[TrackedBasis],
    due: jax.Array | None,
    side: str,
) -> tuple[Packed, jax.Array, linalg.Leading]:
    """Leaves of one shape; `due` is None where there is to be no refresh at all."""
    # Bases are constants to every derivative.
    matrices = jax.lax.stop_gradient(matrices)
    stack = lambda *leaves: jnp.stack(leaves)
    stacked = [packed(entry._replace(label=None)) for entry in entries]
    carried = unpacked(jax.tree.map(stack, *stacked))
    traces = jnp.stack([squared_norm(matrix) for matrix in matrices])
    norms = jnp.sqrt(traces)
    scales = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    cold = carried.refreshes == 0
    finite = jnp.isfinite(traces)
    if due is None:
        asked = jnp.zeros(traces.shape, bool)
        steps = asked.astype(jnp.int32)
    else:
        asked = cold | due
        steps = jnp.where(cold, _COLD_STEPS, due.astype(jnp.int32))
        steps = jnp.where((traces > 0) & finite, steps, -1)
    vectors = carried.vectors.astype(traces.dtype)
    axes = varying_axes(matrices, carried)
    vectors, scales, steps = vary((vectors, scales, steps), axes)
    leading, moved, turned = linalg.follow_leading(
        matrices, vectors, scales, steps, side=side
    )
    failed = asked & ~moved & (traces != 0)
    pick = lambda new, old: jnp.where(
        moved.reshape(moved.shape + (1,) * (old.ndim - moved.ndim)), new, old
    )
    new = TrackedBasis(
        basis=EigenBasis(
            pick(leading.vectors.astype(jnp.float32), carried.vectors),
            pick(
                (leading.values * traces[..., None]).astype(jnp.float32),
                carried.basis.values,
            ),
            pick(traces.astype(jnp.float32), carried.basis.trace),
        ),
        drift=jnp.where(moved & ~cold, turned.astype(jnp.float32), carried.drift),
        refreshes=carried.refreshes + moved.astype(jnp.int32),
        failures=carried.failures + failed.astype(jnp.int32),
    )
    return packed(new), traces, leading
