"""The spectral state: one eigenbasis per layer and side, kept fresh in a schedule.

A `Tracker` says which leaves are followed and how; `Tracker.init` builds a
`SpectralState`, `Tracker.update` refreshes what is due. Every transform that
needs eigenbases carries one such state, and every other use reads it through
`eigenspaces`.

The schedule: a leaf is solved from cold the first time that it sees a gradient
(or activations) that is not zero; from then on it is refreshed warm, once every
`refresh_every` steps, the leaves in turn so that no step pays for all.
"""

import dataclasses
import functools
import inspect
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import checks
from dsbp_jax.layers import LayerActivations, MatrixView, require_paths
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.tracking.eigenspace import SIDES, Eigenspace
from dsbp_jax.tracking.leaves import (
    LayoutLike,
    array_leaves,
    check_layout,
    is_placeholder,
    matrix_views,
)
from dsbp_jax.tracking.refresh import Refresh, refresh_due
from dsbp_jax.tracking.schedule import take_turns
from dsbp_jax.tracking.signals import (
    Signal,
    activation_signal,
    fits,
    gradient_signal,
    rotation_signal,
)
from dsbp_jax.tracking.start import Start, start_all
from dsbp_jax.tracking.tracked_basis import Label, TrackedBasis

#: Arguments of the transforms that track bases which shape their program. Pass them as
#: `optax.inject_hyperparams(dsbp_jax.dsbp, static_args=dsbp_jax.STATIC_ARGS)`,
#: which would otherwise turn ints into arrays and call `layout` as a schedule.
STATIC_ARGS = ("rank", "refresh_every", "num_blocks", "tolerance", "layout", "seed")

# Of some transforms only; optax wants no name that a factory does not have.
_ALSO_STATIC = ("average", "hidden", "nesterov", "scale")


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """What `optax.inject_hyperparams` must leave static, of any transform.

    Args:
      factory: A function of this package that makes a transform.

    Returns:
      Those names of `STATIC_ARGS`, and more of its kind, that it has.

    Example:
      >>> import dsbp_jax
      >>> static_args(dsbp_jax.spectral_muon)
      ('rank', 'refresh_every', 'layout', 'seed', 'hidden', 'nesterov', 'scale')
    """
    known = inspect.signature(factory).parameters
    return tuple(name for name in (*STATIC_ARGS, *_ALSO_STATIC) if name in known)


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

    def entries(self) -> dict[tuple[str, str], TrackedBasis]:
        """The tracked bases by side and path."""
        return {
            (side, path): entry
            for side, entries in self.tracked.items()
            for path, entry in entries.items()
        }

    def spaces(self) -> dict[str, tuple[Eigenspace, ...]]:
        """The eigenspaces of each leaf, the input side first, by path."""
        found: dict[str, tuple[Eigenspace, ...]] = {}
        entries = self.entries()
        for side, path in sorted(entries, key=lambda key: SIDES.index(key[0])):
            found[path] = (*found.get(path, ()), entries[side, path].space)
        return found


def check_refresh(refresh: Any) -> None:
    """Raises unless this is how `update` may be told what to refresh."""
    if not (refresh is None or isinstance(refresh, bool | np.bool_)):
        raise ValueError(
            f"refresh must be a static True, False or None, got {refresh!r}"
        )


def empty_state() -> SpectralState:
    """A state without any basis."""
    return SpectralState(jnp.zeros((), jnp.int32), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracker:
    """What to track and when; static.

    Attributes:
      rank: Columns k per basis.
      source: `"gradient"` (of GᵀG, GGᵀ), `"activation"` (of the layers' own
        covariances) or `"rotation"` (of the rotation that descends).
      side: `"input"`, `"output"`, `"both"`, or `"smaller"`: of each leaf the one of
        the smaller dimension; or `"singular"`: where V may hold the singular vectors
        of a leaf as one matrix, window taps and inputs together, the smaller one.
      refresh_every: Steps between two refreshes of a leaf; None after the first solve
        for ever.
      num_blocks: Krylov blocks of a refresh.
      tolerance: Only rotate a basis while its relative residual is at most this.
      average: The part of old eigenvalues in those of a refresh.
      layout: The matrix views, or a function from params to them, or None to go
        by the shapes.
      seed: Of the random start.
      cap_rank: Whether a leaf of dimension d ≤ k is tracked with d columns;
        otherwise it is not tracked.
      inert: Whether nothing is tracked at all, since nothing will be used.
      needs_all: Whether a leaf cannot do without a signal: activations must then name
        every leaf that is tracked.
      sources: What `source` may be.
    """

    rank: int
    source: str = "gradient"
    side: str = "output"
    refresh_every: int | None = 10
    num_blocks: int = 2
    tolerance: float = 0.0
    average: float = 0.0
    layout: LayoutLike = None
    seed: int = 0
    cap_rank: bool = False
    inert: bool = False
    needs_all: bool = False
    sources: tuple[str, ...] = SOURCES[:2]

    def __post_init__(self) -> None:
        """Validates every field."""
        minimum = {"rank": 1, "refresh_every": 1, "num_blocks": 2, "seed": 0}
        if self.refresh_every is None:
            del minimum["refresh_every"]
        for name, least in minimum.items():
            value = checks.positive_int(name, getattr(self, name), minimum=least)
            object.__setattr__(self, name, value)
        checks.in_unit_interval("tolerance", self.tolerance)
        checks.in_unit_interval("average", self.average)
        check_layout(self.layout)
        checks.one_of("source", self.source, self.sources)
        checks.one_of("side", self.side, (*SIDES, "both", "smaller", "singular"))

    def views(self, params: optax.Params) -> dict[str, MatrixView]:
        """The matrix view of every leaf that is a matrix, by path."""
        return matrix_views(params, self.layout)

    def sides(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The sides tracked of a matrix `(*batch, window, d_in, d_out)`, with ranks."""
        ranks = {}
        if self.side == "singular":
            *_, window, d_in, d_out = shape
            side = SIDES[0] if window == 1 and d_in < d_out else SIDES[1]
            return {side: self.rank} if self.rank < min(window * d_in, d_out) else {}
        smaller = SIDES[0] if shape[-2] <= shape[-1] else SIDES[1]
        wanted = smaller if self.side == "smaller" else self.side
        for side, dim in zip(SIDES, shape[-2:], strict=True):
            if wanted in (side, "both") and (self.rank < dim or self.cap_rank):
                ranks[side] = min(self.rank, dim)
        return ranks

    def init(
        self, params: optax.Params, *, key: jax.Array | None = None
    ) -> SpectralState:
        """Random orthonormal bases for every leaf to be tracked.

        Args:
          params: The params.
          key: Of the random start; by default that of `seed`.

        Returns:
          A state.
        """
        state = empty_state()
        if is_placeholder(params):
            leaf: Any = jnp.zeros(())
            return SpectralState(state.count, leaf)
        leaves = array_leaves(params)
        starts = {}
        for path, view in {} if self.inert else self.views(params).items():
            shape = view.matrix_shape(leaves[path].shape)
            for side, rank in self.sides(shape).items():
                label = Label(
                    side, self.source, leaves[path].shape, *dataclasses.astuple(view)
                )
                number = zlib.crc32(f"{side}/{path}".encode())
                starts[side, path] = Start(label, rank, number)
        draw = (
            (lambda number: jax.random.key(jnp.uint32(self.seed % 2**32) ^ number))
            if key is None
            else functools.partial(jax.random.fold_in, key)
        )
        for (side, path), entry in start_all(starts, draw).items():
            # Inside shard_map the leaves may differ from device to device.
            entry = vary(entry, varying_axes(leaves[path]))
            state.tracked.setdefault(side, {})[path] = entry
        return state

    def update(
        self,
        state: SpectralState,
        updates: optax.Updates,
        *,
        activations: Mapping[str, LayerActivations] | None = None,
        params: optax.Params | None = None,
        refresh: bool | None = None,
        beside: Mapping[str, jax.Array] | None = None,
    ) -> SpectralState:
        """Refreshes what is due.

        Args:
          state: The state of the last step.
          updates: Gradients, shaped like the params; a leaf may be missing (None),
            and then keeps its basis.
          activations: As `dsbp_jax.capture_activations` returns them; needed with
            `source="activation"`. A leaf that they do not name is no layer, and stays
            as it is.
          params: The params; needed with `source="rotation"`.
          refresh: None to follow the schedule; True to refresh every leaf now,
            False to refresh none (two compiled steps instead of one with
            branches). Must be static.
          beside: By path columns `(*batch, d, m)` of the input side; the bases then
            follow what gradients have outside of them, and are orthogonal to them,
            up to rounding, when they are refreshed.

        Returns:
          The new state.

        Raises:
          MissingActivations: There are none.
          ValueError: They are of other paths or another shape, or a leaf has another
            shape than in `init`.
        """
        count = optax.safe_increment(state.count)
        check_refresh(refresh)
        leaves = array_leaves(updates)
        present = self.present(state, leaves)
        if (refresh is not None and not refresh) or not present:
            return SpectralState(count, state.tracked)
        if self.source == "activation":
            present = self._layers(present, activations)
            if not present:
                return SpectralState(count, state.tracked)

        turns, step = self.turns(state)
        tracked = {side: dict(entries) for side, entries in state.tracked.items()}
        # A constant to every derivative; and reverse mode has no while_loop.
        constants = jax.lax.stop_gradient(
            (leaves, activations, array_leaves(params), present, dict(beside or {}))
        )
        leaves, activations, kernels, present, columns = vary(
            constants, varying_axes(constants)
        )

        def signal(side: str, path: str) -> Signal:
            entry = present[side, path]
            if self.source == "activation":
                assert activations is not None
                return activation_signal(
                    activations, entry.vectors.shape[:-1], side, path
                )
            assert entry.label is not None
            view = entry.label.view
            if self.source == "rotation":
                return rotation_signal(view, leaves[path], kernels[path], side)
            return gradient_signal(view, leaves[path], side)

        refreshes = {}
        for key, entry in present.items():
            refreshes[key] = Refresh(
                entry=entry,
                signal=functools.partial(signal, *key),
                turn=turns[key],
                beside=columns.get(key[1]),
            )
        solved = refresh_due(
            refreshes,
            None if refresh else step,
            num_blocks=self.num_blocks,
            tolerance=self.tolerance,
            average=self.average,
        )
        for (side, path), entry in solved.items():
            tracked[side][path] = entry
        return SpectralState(count, tracked)

    def turns(
        self, state: SpectralState
    ) -> tuple[dict[tuple[str, str], int], jax.Array]:
        """At which step of the period each entry is due, and which this is."""
        entries = state.entries()
        if self.refresh_every is None:
            return dict.fromkeys(entries, -1), jnp.zeros_like(state.count)
        costs = {key: math.prod(e.vectors.shape) for key, e in entries.items()}
        step = state.count % self.refresh_every
        return take_turns(costs, self.refresh_every), step

    def present(
        self, state: SpectralState, leaves: Mapping[str, jax.Array]
    ) -> dict[tuple[str, str], TrackedBasis]:
        """The entries whose leaves are there.

        Raises:
          ValueError: A leaf has another shape than in `init`.
        """
        found = {key: e for key, e in state.entries().items() if key[1] in leaves}
        for (_, path), entry in found.items():
            assert entry.label is not None
            if not entry.fits(leaves[path].shape):
                raise ValueError(
                    "updates must have the leaves that the state was made for: "
                    f"{path!r} had shape {entry.label.shape}, got {leaves[path].shape}"
                )
        return found

    def _layers(
        self,
        entries: Mapping[tuple[str, str], TrackedBasis],
        activations: Mapping[str, LayerActivations] | None,
    ) -> dict[tuple[str, str], TrackedBasis]:
        """The entries whose leaves the activations show to be layers."""
        if activations is None:
            raise MissingActivations(
                "update needs activations=..., the second output of "
                "dsbp_jax.capture_activations, because source='activation'"
            )
        paths = [path for _, path in entries]
        if self.needs_all:
            require_paths(paths, activations, "activations")
        if not any(path in activations for path in paths):
            require_paths(paths[:1], activations, "activations")
        layers = {}
        for (side, path), entry in entries.items():
            if path not in activations:
                continue
            space, used = entry.space, activations[path].known_view
            if not fits(activations, space, path):
                seen = f"{path!r} is seen as {space.view}, which its activations "
                seen += f"contradict{f' ({used})' if used else ''}"
                remedy = "pass layout=dsbp_jax.layout(fn, params, *args)"
                if self.layout is not None or self.needs_all:
                    raise ValueError(f"layout must say how leaves are used: {seen}")
                warnings.warn(
                    f"{path!r} keeps its plain gradient: {seen}; {remedy}",
                    stacklevel=2,
                )
                continue
            layers[side, path] = entry
        return layers
