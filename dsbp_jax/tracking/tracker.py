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
from dsbp_jax.tracking.refresh import Refresh, TrackedBasis, refresh_due
from dsbp_jax.tracking.signals import (
    SIDES,
    Signal,
    activation_signal,
    gradient_signal,
    rotation_signal,
)

#: Arguments of the transforms that track bases which shape their program. Pass them as
#: `optax.inject_hyperparams(dsbp_jax.dsbp, static_args=dsbp_jax.STATIC_ARGS)`,
#: which would otherwise turn ints into arrays and call `layout` as a schedule.
STATIC_ARGS = ("rank", "refresh_every", "num_blocks", "tolerance", "layout", "seed")


#: What bases can follow; the last one needs params.
SOURCES = ("gradient", "activation", "rotation")


class MissingActivations(ValueError):
    """An update that follows activations was given none."""


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
      source: `"gradient"` (of GᵀG, GGᵀ), `"activation"` (of the layers' own
        covariances) or `"rotation"` (of the rotation that descends).
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
      sources: What `source` may be.
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
    sources: tuple[str, ...] = SOURCES[:2]

    def __post_init__(self) -> None:
        """Validates every field."""
        minimum = {"rank": 1, "refresh_every": 1, "num_blocks": 2, "seed": 0}
        for name, least in minimum.items():
            value = checks.positive_int(name, getattr(self, name), minimum=least)
            object.__setattr__(self, name, value)
        checks.in_unit_interval("tolerance", self.tolerance)
        check_layout(self.layout)
        checks.one_of("source", self.source, self.sources)
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
        return matrix_views(params, self.layout)

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
        if is_placeholder(params):
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
        params: Any = None,
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
          params: The params; needed with `source="rotation"`.
          refresh: None to follow the schedule; True to refresh every leaf now,
            False to refresh none (two compiled steps instead of one with
            branches). Must be static.

        Returns:
          The new state.

        Raises:
          MissingActivations: There are none.
          ValueError: They are of another path or shape.
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
                raise MissingActivations(
                    "update needs activations=..., the second output of "
                    "dsbp_jax.capture_activations, because source='activation'"
                )
            require_paths([path for _, path in present], activations, "activations")

        offsets = self._offsets(state)
        count_in_period = state.count % self.refresh_every
        tracked = {side: dict(entries) for side, entries in state.tracked.items()}
        # A constant to every derivative; and reverse mode has no while_loop.
        leaves, activations, kernels = jax.lax.stop_gradient(
            (leaves, activations, _array_leaves(params))
        )

        def signal(side: str, path: str, basis: EigenBasis) -> Signal:
            if activations is not None and self.source == "activation":
                return activation_signal(activations, basis, side, path)
            if self.source == "rotation":
                return rotation_signal(views[path], leaves[path], kernels[path], side)
            return gradient_signal(views[path], leaves[path], side)

        refreshes = {}
        for (side, path), entry in present.items():
            entry = jax.lax.stop_gradient(entry)
            turn = offsets[side, path]
            refreshes[side, path] = Refresh(
                entry=entry,
                signal=functools.partial(signal, side, path, entry.basis),
                due=jnp.array(True) if refresh else count_in_period == turn,
                turn=turn,
            )
        solved = refresh_due(
            refreshes, num_blocks=self.num_blocks, tolerance=self.tolerance
        )
        for (side, path), entry in solved.items():
            tracked[side][path] = entry
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


def check_layout(layout: Any) -> None:
    """Raises unless this is a layout, a function to one, or None."""
    if not (layout is None or callable(layout) or isinstance(layout, Layout)):
        raise ValueError(
            "layout must be a dsbp_jax.Layout, a function from params to one, or "
            f"None, got {layout!r}"
        )


def matrix_views(
    params: Any, layout: Layout | Callable[[Any], Layout] | None
) -> dict[str, MatrixView]:
    """The matrix view of every leaf that is a floating-point matrix.

    Args:
      params: The params, or updates of their shape.
      layout: The views, a function from params to them, or None to go by the shapes.

    Returns:
      A dict from canonical path to view.

    Raises:
      ValueError: The layout names no leaf of the params.
    """
    layout = layout(params) if callable(layout) else layout
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


def _array_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path; what has no shape and dtype (functions) is no parameter."""
    leaves = leaves_by_path(tree)
    return {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "dtype")}


def is_placeholder(params: Any) -> bool:
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
