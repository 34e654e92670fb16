"""The spectral state: one eigenbasis per layer and side, kept fresh in a schedule.

A `Tracker` says which leaves are followed and how; `Tracker.init` builds a
`SpectralState`, `Tracker.update` refreshes what is due. Every transform that
needs eigenbases carries one such state, and every other use reads it through
`bases`.

The schedule: a leaf is solved from cold the first time that it sees a gradient
(or activations) that is not zero; from then on it is refreshed warm, once every
`refresh_every` steps, the leaves in turn so that no step pays for all.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import checks, linalg
from dsbp_jax.layers import (
    LayerActivations,
    Layout,
    MatrixView,
    guess_view,
    leaves_by_path,
    require_paths,
)
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.transforms.signals import (
    SIDES,
    Signal,
    activation_signal,
    gradient_signal,
)

#: Arguments of every spectral transform that shape its program. Pass them as
#: `optax.inject_hyperparams(dsbp_jax.dsbp, static_args=dsbp_jax.STATIC_ARGS)`,
#: which would otherwise turn ints into arrays and call `layout` as a schedule.
STATIC_ARGS = ("rank", "refresh_every", "num_blocks", "tolerance", "layout", "seed")

# A cold solve repeats refreshes until the basis is this close to invariant: a
# minibatch's gradient or covariance is itself no better known.
_COLD_TOLERANCE = 1e-2
_COLD_REFRESHES = 16


class TrackedBasis(NamedTuple):
    """An eigenbasis and how its tracking goes; one per leaf and side.

    Attributes:
      basis: The basis carried since the last refresh.
      drift: Mean squared sine of the angles between the last two bases, shape
        `(*batch)`, float32.
      refreshes: Successful refreshes so far, shape `(*batch)`, int32.
      failures: Refreshes refused because their result was not finite or not
        orthonormal, shape `(*batch)`, int32.
    """

    basis: EigenBasis
    drift: jax.Array
    refreshes: jax.Array
    failures: jax.Array


class SpectralState(NamedTuple):
    """Optimizer state: the eigenbases of all tracked leaves.

    Attributes:
      count: Updates so far.  # shape=(), dtype=int32
      tracked: Side (`"input"`, `"output"`) to canonical path to tracked basis.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    tracked: dict[str, dict[str, TrackedBasis]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracker:
    """What to track and when; static.

    Attributes:
      rank: Columns k per basis.
      source: `"gradient"` (of GᵀG, GGᵀ) or `"activation"` (of the layers' own
        covariances).
      side: `"input"`, `"output"`, `"both"`, or `"smaller"`: of each leaf the one of
        the smaller dimension.
      refresh_every: Steps between two refreshes of a leaf.
      num_blocks: Krylov blocks of a refresh.
      tolerance: Only rotate a basis while its relative residual is at most this.
      layout: The matrix views, or a function from params to them, or None to go
        by the shapes.
      seed: Of the random start.
      cap_rank: Whether a leaf of dimension d ≤ k is tracked with d columns;
        otherwise it is not tracked.
    """

    rank: int
    source: str = "gradient"
    side: str = "output"
    refresh_every: int = 10
    num_blocks: int = 2
    tolerance: float = 0.0
    layout: Layout | Callable[[Any], Layout] | None = None
    seed: int = 0
    cap_rank: bool = False

    def __post_init__(self) -> None:
        """Validates every field."""
        minimum = {"rank": 1, "refresh_every": 1, "num_blocks": 2, "seed": 0}
        for name, least in minimum.items():
            value = checks.positive_int(name, getattr(self, name), minimum=least)
            object.__setattr__(self, name, value)
        checks.in_unit_interval("tolerance", self.tolerance)
        if not (self.layout is None or callable(self.layout)) and not isinstance(
            self.layout, Layout
        ):
            raise ValueError(
                "layout must be a dsbp_jax.Layout, a function from params to one, or "
                f"None, got {self.layout!r}"
            )
        checks.one_of("source", self.source, ("gradient", "activation"))
        checks.one_of("side", self.side, (*SIDES, "both", "smaller"))

    def views(self, params: Any) -> dict[str, MatrixView]:
        """The matrix view of every leaf that is a floating-point matrix.

        Args:
          params: The params, or updates of their shape.

        Returns:
          A dict from canonical path to view.

        Raises:
          ValueError: The layout names no leaf of the params.
        """
        layout = self.layout(params) if callable(self.layout) else self.layout
        leaves = _array_leaves(params)
        if layout and leaves and not any(path in leaves for path in layout):
            # A masked tree may lack some leaves; the wrong tree lacks all.
            require_paths(list(layout)[:1], leaves, "params")
        views = {}
        for path, leaf in leaves.items():
            view = guess_view(leaf.shape) if layout is None else layout.get(path)
            if view is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
                views[path] = view
        return views

    def sides(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The sides tracked of a matrix `(*batch, window, d_in, d_out)`, with ranks."""
        ranks = {}
        smaller = SIDES[0] if shape[-2] <= shape[-1] else SIDES[1]
        wanted = smaller if self.side == "smaller" else self.side
        for side, dim in zip(SIDES, shape[-2:], strict=True):
            if wanted in (side, "both") and (self.rank < dim or self.cap_rank):
                ranks[side] = min(self.rank, dim)
        return ranks

    def init(self, params: Any, *, key: jax.Array | None = None) -> SpectralState:
        """Random orthonormal bases for every leaf to be tracked.

        Args:
          params: The params.
          key: Of the random start; by default that of `seed`.

        Returns:
          A state.
        """
        count = jnp.zeros((), jnp.int32)
        if _is_placeholder(params):
            return SpectralState(count, jnp.zeros(()))  # type: ignore[arg-type]
        leaves = _array_leaves(params)
        tracked: dict[str, dict[str, TrackedBasis]] = {}
        for path, view in self.views(params).items():
            shape = view.matrix_shape(leaves[path].shape)
            for side, rank in self.sides(shape).items():
                name = zlib.crc32(f"{side}/{path}".encode())
                own = (
                    jax.random.key(self.seed ^ name)
                    if key is None
                    else jax.random.fold_in(key, name)
                )
                tracked.setdefault(side, {})[path] = _start(shape, side, rank, own)
        return SpectralState(count, tracked)

    def update(
        self,
        state: SpectralState,
        updates: Any,
        views: Mapping[str, MatrixView],
        *,
        activations: Mapping[str, LayerActivations] | None = None,
        refresh: bool | None = None,
    ) -> SpectralState:
        """Refreshes what is due.

        Args:
          state: The state of the last step.
          updates: Gradients, shaped like the params; a leaf may be missing (None),
            and then keeps its basis.
          views: The matrix views of the leaves, from `Tracker.views`.
          activations: As `dsbp_jax.capture_activations` returns them; needed with
            `source="activation"`.
          refresh: None to follow the schedule; True to refresh every leaf now,
            False to refresh none (two compiled steps instead of one with
            branches). Must be static.

        Returns:
          The new state.

        Raises:
          ValueError: Activations are missing, or are of another path or shape.
        """
        count = optax.safe_increment(state.count)
        if not (refresh is None or isinstance(refresh, bool | np.bool_)):
            raise ValueError(
                f"refresh must be a static True, False or None, got {refresh!r}"
            )
        leaves = _array_leaves(updates)
        present = {
            (side, path): entry
            for side, entries in state.tracked.items()
            for path, entry in entries.items()
            if path in leaves
        }
        if (refresh is not None and not refresh) or not present:
            return SpectralState(count, state.tracked)
        if self.source == "activation":
            if activations is None:
                raise ValueError(
                    "update needs activations=..., the second output of "
                    "dsbp_jax.capture_activations, because source='activation'"
                )
            require_paths([path for _, path in present], activations, "activations")

        offsets = self._offsets(state)
        tracked = {side: dict(entries) for side, entries in state.tracked.items()}
        for (side, path), entry in present.items():
            if activations is not None and self.source == "activation":
                signal = activation_signal(activations, entry.basis, side, path)
            else:
                signal = gradient_signal(views[path], leaves[path], side)
            scheduled = state.count % self.refresh_every == offsets[side, path]
            due = jnp.array(True) if refresh else scheduled
            tracked[side][path] = self._refresh(entry, signal, due)
        return SpectralState(count, tracked)

    def _offsets(self, state: SpectralState) -> dict[tuple[str, str], int]:
        """The step of the period at which each leaf is due, balanced by cost."""
        cost = {
            (side, path): math.prod(entry.basis.vectors.shape)
            for side, entries in state.tracked.items()
            for path, entry in entries.items()
        }
        # The longest first, each to the step with the least to do so far; steps
        # are tried far from each other first.
        load = [0] * self.refresh_every
        stride = max(1, self.refresh_every // max(1, len(cost)))
        order = sorted(range(self.refresh_every), key=lambda step: step % stride)
        offsets = {}
        for key in sorted(cost, key=lambda key: -cost[key]):
            offsets[key] = min(order, key=lambda step: load[step])
            load[offsets[key]] += cost[key]
        return offsets

    def _refresh(
        self, entry: TrackedBasis, signal: Signal, due: jax.Array
    ) -> TrackedBasis:
        # A constant to every derivative; and reverse mode has no while_loop.
        entry, x, count = jax.lax.stop_gradient((entry, signal.x, signal.count))
        solve = functools.partial(self._solve, axis=signal.axis)
        for _ in x.shape[:-2]:
            solve = jax.vmap(solve, in_axes=(0, 0, 0, None))
        keep = lambda entry, x, count, due: entry
        wanted = due | jnp.any(entry.refreshes == 0)
        wanted = linalg.unbatched_max(wanted) > 0
        return jax.lax.cond(wanted, solve, keep, entry, x, count, due)

    def _solve(
        self,
        entry: TrackedBasis,
        x: jax.Array,
        count: jax.Array,
        due: jax.Array,
        *,
        axis: int,
    ) -> TrackedBasis:
        """A cold solve, a warm refresh if due, or nothing, for one basis."""
        operator = linalg.gram(x, count=count, axis=axis)
        cold = entry.refreshes == 0
        finite = jnp.isfinite(operator.trace) | ~(cold | due)
        # Without a signal (a layer behind zero-initialised ones) there is nothing
        # to solve, and the leaf stays cold.
        limit = jnp.where(cold, _COLD_REFRESHES, due.astype(jnp.int32))
        limit = jnp.where(operator.trace > 0, limit, 0)
        # A random start is never near enough; what follows it is.
        tolerance: float | jax.Array = self.tolerance
        if not checks.is_static(tolerance, 0):
            tolerance = jnp.where(cold, -1.0, tolerance)

        def wanted(residual: jax.Array, ok: jax.Array, step: jax.Array) -> jax.Array:
            rough = (step == 0) | (residual > _COLD_TOLERANCE)
            return (step < limit) & rough & ok

        def refine(carry: tuple) -> tuple:
            basis, residual, ok, step = carry
            new, info = linalg.refresh_with_info(
                operator, basis, num_blocks=self.num_blocks, tolerance=tolerance
            )
            # Under vmap the loop runs until the last is done; the others wait.
            take = wanted(residual, ok, step)
            basis = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, basis)
            residual = jnp.where(take, info.residual, residual)
            return basis, residual, ok & (info.ok | ~take), step + 1

        def unfinished(carry: tuple) -> jax.Array:
            return linalg.unbatched_max(wanted(*carry[1:])) > 0

        start = (entry.basis, jnp.float32(0), finite, jnp.int32(0))
        basis, _, ok, _ = jax.lax.while_loop(unfinished, refine, start)
        done = ok & (limit > 0)
        overlap = basis.vectors.T @ entry.basis.vectors
        moved = 1 - jnp.sum(overlap**2) / overlap.shape[0]
        return TrackedBasis(
            basis=basis,
            drift=jnp.where(done & ~cold, jnp.maximum(moved, 0), entry.drift),
            refreshes=entry.refreshes + done.astype(jnp.int32),
            failures=entry.failures + (~ok).astype(jnp.int32),
        )


def _array_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path; what has no shape and dtype (functions) is no parameter."""
    leaves = leaves_by_path(tree)
    return {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "dtype")}


def _is_placeholder(params: Any) -> bool:
    """Whether these are the params with which optax.tree.map_params calls `init`.

    It passes one node of its own without children, and wants a state in which
    whatever holds no copy of the params is a leaf.
    """
    structure: Any = jax.tree.structure(params)
    empty = structure.num_nodes == 1 and structure.num_leaves == 0
    return empty and not isinstance(params, dict | tuple | list | None | Mapping)


def _start(
    shape: tuple[int, ...], side: str, rank: int, key: jax.Array
) -> TrackedBasis:
    """The entry of a leaf whose matrices have shape `(*batch, window, in, out)`."""
    batch, dim = shape[:-3], shape[-2 + SIDES.index(side)]
    basis = linalg.init_basis(dim, rank, key=key)
    basis = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), basis)
    # Three arrays of their own: one buffer cannot be donated twice.
    return TrackedBasis(
        basis=basis,
        drift=jnp.zeros(batch, jnp.float32),
        refreshes=jnp.zeros(batch, jnp.int32),
        failures=jnp.zeros(batch, jnp.int32),
    )
