"""The columns of a layer: some follow its inputs, some its gradient.

The first are the leading eigenvectors of the layer's own input covariance, the
others those of GGᵀ in what the first leave over; together they are orthonormal.
Both are spectral states like those of the gradient transformations, kept by the
same `Tracker`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.backprop.cost import Cost, sketch_flops, sketched_sites
from dsbp_jax.backprop.seen import Seen, input_signal, outside_signal, refreshed
from dsbp_jax.layers import (
    LayerActivations,
    Layout,
    MatrixView,
    Trace,
    array_leaves,
    capture_traced,
    leaves_by_path,
)
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import specs_of, with_auto_axes
from dsbp_jax.tracking import (
    Eigenspace,
    SpectralState,
    Tracker,
    empty_state,
    wide,
)


class ColumnsState(NamedTuple):
    """The columns of every layer that has some.

    Attributes:
      activation: Eigenbases of the input covariances.
      gradient: Eigenbases of GGᵀ outside of the former.
    """

    activation: SpectralState
    gradient: SpectralState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """How many columns follow what, and when they are refreshed; static.

    Attributes:
      rank: All columns.
      tracking: Those that follow the gradient.
      refresh_every: Steps between two refreshes in `update`.
    """

    rank: int
    tracking: int
    refresh_every: int = 1

    def __post_init__(self) -> None:
        """Validates every field."""
        rank = checks.positive_int("rank", self.rank)
        tracking = checks.positive_int("tracking", self.tracking, 0, rank)
        every = checks.positive_int("refresh_every", self.refresh_every)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "tracking", tracking)
        object.__setattr__(self, "refresh_every", every)

    def _tracker(self, source: str, layout: Layout) -> Tracker | None:
        ranks = {"activation": self.rank - self.tracking, "gradient": self.tracking}
        if not ranks[source]:
            return None
        return Tracker(
            rank=ranks[source],
            source=source,
            side="input",
            refresh_every=self.refresh_every,
            layout=layout,
        )

    def init(self, params: Any, layout: Layout, key: jax.Array) -> ColumnsState:
        """Random columns for the leaves of a layout.

        Args:
          params: The parameters.
          layout: The matrix view of each leaf that gets columns.
          key: Of the random start.

        Returns:
          A state.
        """
        states = {}
        for name, source_key in zip(
            ColumnsState._fields, jax.random.split(key), strict=True
        ):
            tracker = self._tracker(name, layout)
            states[name] = (
                empty_state()
                if tracker is None
                else tracker.init(params, key=source_key)
            )
        return ColumnsState(**states)

    def update(
        self,
        state: ColumnsState,
        params: Any,
        layout: Layout,
        *,
        activations: Mapping[str, LayerActivations],
        gradients: Any = None,
        refresh: bool | None = None,
    ) -> ColumnsState:
        """Refreshes the columns that are due.

        Args:
          state: The columns.
          params: The parameters, for their shapes.
          layout: That of `init`.
          activations: The inputs of each layer.
          gradients: Exact gradients, shaped like the params; needed where columns
            follow the gradient.
          refresh: True for all, None for those that are due by the schedule.

        Returns:
          The new columns.
        """
        run = lambda state, params, activations, gradients: self._update(
            state, params, layout, activations, gradients, refresh
        )
        return with_auto_axes(
            run,
            state,
            params,
            dict(activations),
            gradients,
            out_specs=lambda: specs_of(state),
        )

    def _update(
        self,
        state: ColumnsState,
        params: Any,
        layout: Layout,
        activations: Mapping[str, LayerActivations],
        gradients: Any,
        refresh: bool | None,
    ) -> ColumnsState:
        activation, gradient = state
        # Leaves that are not in the layout now keep their columns.
        leaves = leaves_by_path(params)
        present = {path: leaves[path] for path in layout}
        tracker = self._tracker("activation", layout)
        if tracker is not None:
            activation = tracker.update(
                activation, present, activations=activations, refresh=refresh
            )
        tracker = self._tracker("gradient", layout)
        if tracker is not None:
            exact = leaves_by_path(gradients)
            gradient = tracker.update(
                gradient,
                {path: exact[path] for path in layout},
                refresh=refresh,
                beside=vectors(activation),
            )
        return ColumnsState(activation, gradient)

    def follow(self, state: ColumnsState, seen: Mapping[str, Seen]) -> ColumnsState:
        """Refreshes the columns of some leaves from what was seen of them.

        Columns of which there are more than rows would follow these alone, and the
        next rows next time. So a covariance then keeps a part of what it was,
        `1 − n/k`, and always rests on about as many rows as it has columns.

        Args:
          state: The columns.
          seen: By path; other leaves keep their columns.

        Returns:
          The new columns.
        """
        run = lambda state, seen: self._follow(state, jax.lax.stop_gradient(seen))
        return with_auto_axes(run, state, dict(seen), out_specs=lambda: specs_of(state))

    def _follow(self, state: ColumnsState, seen: Mapping[str, Seen]) -> ColumnsState:
        activation = refreshed(state.activation, seen, input_signal, {})
        beside = vectors(activation)
        gradient = refreshed(state.gradient, seen, outside_signal, beside)
        return ColumnsState(activation, gradient)

    def measure(
        self,
        traced: Trace,
        state: ColumnsState,
        params: Any,
        layout: Layout,
        args: tuple,
        *,
        has_aux: bool,
    ) -> ColumnsState:
        """Refreshes all columns from a batch, by one exact pass of the model.

        Args:
          traced: The loss, traced with these arguments.
          state: The columns.
          params: The parameters.
          layout: That of `init`.
          args: The other arguments of the loss.
          has_aux: Whether the loss returns a pair.

        Returns:
          The new columns.

        Raises:
          ValueError: The batch gives a layer fewer rows than columns that follow
            its inputs.
        """
        if not layout:
            return state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            arrays = array_leaves((params, args, {}))
            out, activations = capture_traced(traced, arrays, sides=("inputs",))
            return checks.scalar_loss(out, has_aux), activations

        if self.tracking:
            gradients, activations = jax.grad(loss, has_aux=True)(params)
        else:
            gradients, (_, activations) = None, loss(params)
        wanted = self.rank - self.tracking
        for path in layout:
            rows = activations[path].inputs.shape[-2]
            if rows < wanted:
                raise ValueError(
                    f"args must give every layer at least {wanted} rows to refresh as "
                    f"many columns; {path!r} sees {rows}"
                )
        return self.update(
            state,
            params,
            layout,
            activations=activations,
            gradients=gradients,
            refresh=True,
        )


def vectors(*states: SpectralState) -> dict[str, jax.Array]:
    """Path to columns `(*batch, d_in, q)`, of several states side by side."""
    parts: dict[str, list[jax.Array]] = {}
    for state in states:
        for path, entry in state.tracked.get("input", {}).items():
            parts.setdefault(path, []).append(entry.vectors)
    return {
        path: found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)
        for path, found in parts.items()
    }


def find_layers(
    traced: Trace, columns: int, has_aux: bool, cost: Cost = sketch_flops
) -> Layout:
    """Which leaves of a traced loss get columns.

    Args:
      traced: The loss.
      columns: How many.
      has_aux: Whether the loss returns a pair.
      cost: What of a step is to be cheaper.

    Returns:
      The view of each leaf whose weight gradient is cheaper so.

    Raises:
      ValueError: The loss is no scalar, or no leaf of params is used as a layer.
    """
    checks.scalar_loss(traced.out, has_aux)
    if not traced.sites:
        raise ValueError(
            f"params must hold the weights of a layer in loss_fn, got "
            f"{len(traced.leaves)} array leaves that are none; "
            "dsbp_jax.explain(loss_fn, params, *args) says why, leaf by leaf"
        )
    sites = sketched_sites(traced, columns, cost)
    return Layout((path, site.view) for path, site in sites.items())


def outside(
    gradient: jax.Array, view: MatrixView, basis: jax.Array | None
) -> jax.Array:
    """The part of a gradient outside of some columns.

    Args:
      gradient: Of a leaf.
      view: The leaf's matrix view.
      basis: Columns `(*batch, d_in, k)`, or None for none.

    Returns:
      `(I − VVᵀ)G`, shaped like the leaf, float32 or wider.
    """
    wider = gradient.astype(wide(gradient.dtype))
    if basis is None:
        return wider
    *batch, _, rank = basis.shape
    known = EigenBasis(basis, jnp.zeros((*batch, rank)), jnp.zeros(batch))
    solved = jnp.ones(batch, bool)
    return Eigenspace(known, solved, view, "input", "columns").outside(wider)
