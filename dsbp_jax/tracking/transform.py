"""The one builder of transformations that track bases.

What they have in common stands here once: optax's placeholders, the refresh, Explicit
meshes, missing params, arguments that are somebody else's. What differs is a function
of the eigenspaces.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from dsbp_jax.layers import LayerActivations
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking.eigenspace import Eigenspace
from dsbp_jax.tracking.tracker import SpectralState, Tracker


class Step(NamedTuple):
    """What a transformation sees of one update.

    Attributes:
      updates: As they came.
      params: As they came; may be None unless the transformation needs them.
      state: The whole state as it came.
      spectral: The spectral state, what was due refreshed.
      spaces: Its eigenspaces by canonical path.
      refresh: As `update` was called.
      extra: All other arguments of `update`.
    """

    updates: optax.Updates
    params: optax.Params | None
    state: Any
    spectral: SpectralState
    spaces: dict[str, tuple[Eigenspace, ...]]
    refresh: bool | None
    extra: Mapping[str, Any]


def require_params(name: str, params: optax.Params | None) -> None:
    """Raises where an update came without params."""
    if params is None:
        raise ValueError(f"{name} needs params: call update(grads, state, params)")


def tracked(
    tracker: Tracker,
    use: Callable[[Step], tuple[optax.Updates, Any]],
    *,
    begin: Callable[[optax.Params, SpectralState], Any] | None = None,
    needs_params: str | None = None,
    takes_bases: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that refreshes its bases and then uses them.

    Args:
      tracker: What it tracks.
      use: Gives the new updates and the new state of a step. By its annotation
        a state is the `SpectralState` itself, or has one in its field `spectral`.
      begin: Gives the first state from params and the first spectral state; by default
        the latter is the whole state. Params may be optax's placeholder
        (`is_placeholder`).
      needs_params: The name of the transformation, where it needs params.
      takes_bases: Whether an update that comes with `bases=` refreshes none.

    Returns:
      The transformation; `update` takes `activations=` and `refresh=` and tolerates
      any other argument.
    """

    def init_fn(params: optax.Params) -> Any:
        spectral = tracker.init(params)
        return spectral if begin is None else begin(params, spectral)

    @keep_shardings
    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        activations: Mapping[str, LayerActivations] | None = None,
        refresh: bool | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, Any]:
        if needs_params is not None:
            require_params(needs_params, params)
        if takes_bases and extra.get("bases") is not None:
            refresh = False
        spectral = tracker.update(
            state if isinstance(state, SpectralState) else state.spectral,
            updates,
            activations=activations,
            params=params,
            refresh=refresh,
        )
        step = Step(updates, params, state, spectral, spectral.spaces(), refresh, extra)
        return use(step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
