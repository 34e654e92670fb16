"""The ready optimizer: projection, momentum, learning rate and spectral decay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from dsbp_jax import checks
from dsbp_jax.layers import Layout
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import SIDES, SpectralState, Tracker
from dsbp_jax.transforms.decay import add_decay
from dsbp_jax.transforms.projection import project


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
    residual: float | jax.Array = 0.1,
    momentum: float | jax.Array = 0.9,
    decay: float | jax.Array | None = None,
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    energy: float | jax.Array | None = None,
    layout: Layout | Callable[[Any], Layout] | None = None,
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
      refresh_every: As `dsbp_jax.spectral_projection`; so are those below.
      num_blocks: See there.
      tolerance: See there.
      energy: See there.
      layout: See there.
      seed: See there.

    Returns:
      A transformation whose updates are to be added to the params.

    Raises:
      ValueError: An argument is out of its range; in `update`, activations or
        params are missing where they are needed.

    References:
      Muthuraman, Dynamic spectral backpropagation, arXiv 2505.23369, 2025.

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
    projects = not checks.is_static(residual, 1)
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
    )
    descent = optax.chain(
        *([] if checks.is_static(momentum, 0) else [optax.trace(momentum)]),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )
    decay_side = "input" if side == "input" else "output"

    def init_fn(params: Any) -> DsbpState:
        spectral = tracker.init(params)
        if not (decays or projects):
            spectral = SpectralState(spectral.count, {})
        return DsbpState(spectral, descent.init(params))

    @keep_shardings
    def update_fn(
        updates: Any,
        state: DsbpState,
        params: Any = None,
        *,
        activations: Any = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, DsbpState]:
        del extra_args
        views = tracker.views(updates if params is None else params)
        spectral = tracker.update(
            state.spectral, updates, views, activations=activations, refresh=refresh
        )
        if projects:
            updates = project(
                updates, spectral, views, residual=residual, energy=energy
            )
        updates, descent_state = descent.update(updates, state.descent, params)
        if decay is not None and decays:
            if params is None:
                raise ValueError(
                    "dsbp with decay needs params: call update(grads, state, params)"
                )
            entries = spectral.tracked.get(decay_side, {})
            held = {path: entry.basis for path, entry in entries.items()}
            updates = add_decay(updates, params, held, views, decay, decay_side)
        updates = jax.tree.map(lambda u: -u, updates)
        return updates, DsbpState(spectral, descent_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
