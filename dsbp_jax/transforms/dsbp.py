"""The ready optimizer: projection, momentum, learning rate and spectral decay."""

from typing import NamedTuple

import optax

from dsbp_jax import checks
from dsbp_jax.tracking import (
    SIDES,
    LayoutLike,
    Number,
    SpectralState,
    Step,
    Tracker,
    require_params,
    tracked,
)
from dsbp_jax.transforms.decay import add_decay
from dsbp_jax.transforms.projection import project_step


class DsbpState(NamedTuple):
    """State of `dsbp`.

    Attributes:
      spectral: The eigenbases, shared by projection and decay.
      descent: State of momentum and learning rate.
    """

    spectral: SpectralState
    descent: optax.OptState


def dsbp(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 64,
    *,
    source: str = "gradient",
    side: str = "output",
    residual: Number = 0.1,
    momentum: Number = 0.9,
    decay: Number | None = None,
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    energy: Number | None = None,
    layout: LayoutLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Dynamic spectral backpropagation as a ready optimizer.

    One step, with m the momentum's trace of the projected gradients and (λ₁, e₁)
    the layer's leading eigenpair:

        W ← W − η·m(PG + κ(G − PG)) − β λ₁ W e₁e₁ᵀ

    `dsbp(lr, k, source="activation", residual=0.0, momentum=0.0, decay=β)` is the
    paper's rule, with its decay applied to W so that it has W's shape, and with
    covariances divided by the number of rows.

    Args:
      learning_rate: η, a number or a schedule.
      rank: Columns k of each eigenbasis.
      source: `"gradient"` or `"activation"` (then `update` takes `activations=`).
      side: `"output"`, `"input"` or `"both"`.
      residual: κ in [0, 1], the share of the complement that is kept.
      momentum: Of `optax.trace`; 0 keeps none.
      decay: β; not multiplied by the learning rate. Keep `βλ₁` under 1. None or a
        static 0 leaves it out. With `side="both"` the output side decays.
      refresh_every: Steps between two refreshes of a leaf; the leaves take turns.
      num_blocks: Krylov blocks of a refresh, at least 2.
      tolerance: While a basis is invariant to this relative residual, in [0, 1], only
        rotate it inside its span.
      energy: Use only the leading columns that hold this share of the trace.
      layout: Matrix views from `dsbp_jax.layout`; None goes by the shapes.
      seed: Of the bases' random start.

    Returns:
      A transformation whose updates are to be added to the params.

    Raises:
      ValueError: An argument is out of its range; in `update`, activations or
        params are missing where they are needed.

    References:
      [P] Muthuraman, Dynamic spectral backpropagation, arXiv 2505.23369, 2025.
      METHODS section 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax, dsbp_jax
      >>> tx = dsbp_jax.dsbp(0.1, rank=2)
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> loss_fn = lambda p: jnp.sum((p["kernel"] - 2.0) ** 2)
      >>> updates, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"][0].round(2))
      [1.2 1.2 1.2]
    """
    checks.one_of("side", side, (*SIDES, "both"))
    checks.in_unit_interval("residual", residual)
    checks.in_unit_interval("momentum", momentum)
    if decay is not None:
        checks.non_negative("decay", decay)
    if energy is not None:
        checks.in_unit_interval("energy", energy, open_left=True)
    decays = decay is not None and not checks.is_static(decay, 0)
    tracker = Tracker(
        rank=rank,
        source=source,
        side=side,
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
        # A layer that is too narrow to project still decays.
        cap_rank=decays,
        inert=not decays and checks.is_static(residual, 1),
    )
    momentums = [] if checks.is_static(momentum, 0) else [optax.trace(momentum)]
    return projected_descent(
        optax.chain(*momentums, optax.scale_by_learning_rate(learning_rate)),
        tracker,
        residual=residual,
        decay=decay if decays else None,
        energy=energy,
    )


def projected_descent(
    descent: optax.GradientTransformation,
    tracker: Tracker,
    *,
    residual: Number,
    decay: Number | None,
    energy: Number | None,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer on projected gradients, with a decay in the same eigenspaces.

    Args:
      descent: The optimizer; its updates go to `optax.apply_updates`.
      tracker: What is tracked.
      residual: κ in [0, 1]; a static 1 leaves the gradients as they are.
      decay: β, or None.
      energy: Share of the trace to project on, or None for all columns.

    Returns:
      A transformation with a `DsbpState`.
    """
    decay_side = "input" if tracker.side == "input" else "output"

    def begin(params: optax.Params, spectral: SpectralState) -> DsbpState:
        return DsbpState(spectral, descent.init(params))

    def use(step: Step) -> tuple[optax.Updates, DsbpState]:
        updates = step.updates
        if not checks.is_static(residual, 1):
            updates = project_step(step, residual, energy)
        updates, state = descent.update(updates, step.state.descent, step.params)
        if decay is not None:
            require_params("dsbp with decay", step.params)
            leading = {
                path: space.leading(1)
                for path, spaces in step.spaces.items()
                for space in spaces
                if space.side == decay_side
            }
            updates = add_decay(updates, step.params, leading, -decay)
        return updates, DsbpState(step.spectral, state)

    return tracked(tracker, use, begin=begin)
