"""Bases of the updates themselves, followed without lag.

A basis that an update is filtered with has to be this update's: what is one refresh
old leaves drifting singular values up. So here the refresh is a power step whose
products the filter uses again, three with the kernel in all, and two where no refresh
is due. `refresh` is for whatever else is followed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import linalg
from dsbp_jax.layers import MatrixView
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.tracking.eigenspace import wide
from dsbp_jax.tracking.leaves import array_leaves
from dsbp_jax.tracking.tracked_basis import TrackedBasis
from dsbp_jax.tracking.tracker import SpectralState, Tracker, check_refresh

# Power steps from a random start.
_COLD_STEPS = 8


class Followed(NamedTuple):
    """The leading part of an update, as matrices `(*batch, a, b)`.

    Attributes:
      trace: Their squared norms, shape `(*batch)`.
      vectors: Shape `(*batch, d, k)`.
      thin: The leading part over the norm, `(*batch, n, k)`.
      values: Eigenvalues over the trace, descending, `(*batch, k)`.
      rotation: Their eigenvectors in those columns, `(*batch, k, k)`.
      side: On which side the vectors are.
    """

    trace: jax.Array
    vectors: jax.Array
    thin: jax.Array
    values: jax.Array
    rotation: jax.Array
    side: str


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
) -> tuple[SpectralState, dict[str, Followed]]:
    """Refreshes what is due, and splits each tracked update at its basis.

    Args:
      tracker: Of side `"singular"`.
      state: The state of the last step.
      updates: What is followed.
      refresh: As for `Tracker.update`.

    Returns:
      The new state, and the leading part of every tracked leaf by path.

    Raises:
      ValueError: A leaf has another shape than in `init`, or bases another rank.
    """
    check_refresh(refresh)
    leaves = array_leaves(updates)
    entries = tracker.present(state, leaves)
    turns, now = tracker.turns(state)
    # Leaves of one shape that are due together share what is not a product with them.
    groups: dict[tuple, list[tuple[str, str]]] = {}
    matrices = {}
    for key, entry in entries.items():
        side, path = key
        assert entry.label is not None
        rank = entry.vectors.shape[-1]
        if rank != tracker.rank:
            raise ValueError(
                f"rank must be {rank}, that of the state's basis of {path!r}, got "
                f"{tracker.rank}"
            )
        # Bases are constants to every derivative.
        leaf = jax.lax.stop_gradient(leaves[path])
        matrices[key] = matrix = as_matrices(entry.label.view, leaf)
        form = side, matrix.shape, matrix.dtype, turns[key]
        groups.setdefault(form, []).append(key)

    tracked = {side: dict(found) for side, found in state.tracked.items()}
    parts: dict[str, Followed] = {}
    for (side, _, _, turn), keys in groups.items():
        due = jnp.array(bool(refresh)) if refresh is not None else now == turn
        if refresh is False:
            due = None
        found = _follow(
            [matrices[key] for key in keys], [entries[key] for key in keys], due, side
        )
        for key, (entry, part) in zip(keys, found, strict=True):
            tracked[key[0]][key[1]] = entry
            parts[key[1]] = part
    return SpectralState(optax.safe_increment(state.count), tracked), parts


def _follow(
    matrices: list[jax.Array],
    entries: list[TrackedBasis],
    due: jax.Array | None,
    side: str,
) -> list[tuple[TrackedBasis, Followed]]:
    """Leaves of one shape; `due` is None where there is to be no refresh at all."""
    stack = lambda *leaves: jnp.stack(leaves)
    carried = jax.tree.map(stack, *[e._replace(label=None) for e in entries])
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
    at = lambda tree, place: jax.tree.map(lambda x: x[place], tree)

    def part(place: int) -> Followed:
        one = at(leading, place)
        columns = one.vectors, one.thin, one.values, one.rotation
        return Followed(traces[place], *columns, side)

    return [
        (
            at(new, place)._replace(label=entry.label),
            part(place),
        )
        for place, entry in enumerate(entries)
    ]
