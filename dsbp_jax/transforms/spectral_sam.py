"""Sharpness-aware minimisation as a transformation that keeps its own bases fresh.

The perturbations are those of `sam`: along the gradient inside each layer's eigenspace,
or tilted towards the Hessian's top eigenvector, which are tracked here or read from the
optimizer inside.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import batching, checks, linalg
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import specs_of, with_auto_axes
from dsbp_jax.tracking import (
    SIDES,
    Eigenspace,
    LayoutLike,
    Number,
    SpectralState,
    Tracker,
    describe,
    eigenspaces,
    empty_state,
    is_placeholder,
    matrix_views,
    spectral_states,
)
from dsbp_jax.transforms.sam import MODES, leading, like, perturb, projected

# The Hessian's product is the gradient's derivative: so many of them find its top
# eigenvector well enough, from a random start and from the last one alike.
_HESSIAN_BLOCKS = 8


class SamState(NamedTuple):
    """State of `spectral_sam`.

    Attributes:
      spectral: The bases that are tracked here, if any.
      hessian: The Hessian's top eigenpair over all parameters, vectors of shape
        `(D, 1)`; None in the other modes.
      inner: The state of the optimizer.
    """

    spectral: SpectralState
    hessian: EigenBasis | None
    inner: optax.OptState


def spectral_sam(
    inner: optax.GradientTransformation,
    rho: Number,
    *,
    mode: str = "spectral",
    rank: int | None = None,
    source: str = "gradient",
    side: str = "output",
    alpha: Number = 0.2,
    refresh_every: int | None = None,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: LayoutLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Gives an optimizer the gradient at the worst point nearby, as a transformation.

    `update(grads, state, params, grad_fn=f)` takes the gradients at the params, and
    `f(params, i)` as `optax.contrib.sam` does; it is called with i = 0 at the perturbed
    params (and differentiated where mode `"eigen"` follows the Hessian). All other
    arguments are passed on to the optimizer.

    What the optimizer gets are new gradients. So what shall act on them (clipping,
    weight decay, `optax.MultiSteps`) belongs inside `inner`; before this in a chain it
    only changes the direction of the perturbation. Under `optax.masked` and
    `optax.partition`, `grad_fn` gets the params with the holes of the mask.

    Args:
      inner: The optimizer; any Optax transformation.
      rho: As `sam_value_and_grad`.
      mode: As there. `"eigen"` differentiates `grad_fn`, and holds the eigenvector of
        all parameters in one vector, which an Explicit mesh cannot shard.
      rank: Columns k of each basis in mode `"spectral"`, tracked here by the arguments
        below. None takes the bases that the optimizer itself tracks, such as those of
        `dsbp`, as its last step left them; the arguments below then say nothing.
      source: `"gradient"` or `"activation"` (then `update` takes `activations=`).
      side: `"input"`, `"output"` or `"both"`.
      alpha: As `sam_value_and_grad`.
      refresh_every: Steps between two refreshes; by default 10 of a leaf's basis, the
        leaves in turn, and 100 of the Hessian's eigenvector.
      num_blocks: Krylov blocks of a refresh, at least 2.
      tolerance: While a basis is invariant to this relative residual, in [0, 1], only
        rotate it inside its span.
      layout: Matrix views from `dsbp_jax.layout`; None goes by the shapes.
      seed: Of the bases' random start.

    Returns:
      A transformation. `dsbp_jax.bases` finds the bases in its state.

    Raises:
      ValueError: An argument is out of its range; in `update`, params, `grad_fn` or
        activations are missing.

    References:
      As `sam_value_and_grad`.

    Example:
      >>> import dsbp_jax
      >>> loss_fn = lambda p: 0.5 * jnp.sum(p["w"] ** 2)
      >>> tx = dsbp_jax.spectral_sam(optax.sgd(0.1), rho=0.5, rank=1)
      >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> grad_fn = lambda params, i: jax.grad(loss_fn)(params)
      >>> grads, state = grad_fn(params, 0), tx.init(params)
      >>> updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
      >>> print(updates["w"].diagonal().round(3))
      [-0.35 -0.1 ]
    """
    checks.non_negative("rho", rho)
    checks.one_of("mode", mode, MODES)
    checks.one_of("side", side, (*SIDES, "both"))
    checks.non_negative("alpha", alpha)
    if rank is not None and mode != "spectral":
        raise ValueError(f"rank must be None with mode={mode!r}, got {rank!r}")
    every = (100 if mode == "eigen" else 10) if refresh_every is None else refresh_every
    tracks = mode == "spectral" and rank is not None
    tracker = Tracker(
        rank=1 if rank is None else rank,
        source=source,
        side=side,
        refresh_every=every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
    )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> SamState:
        spectral, hessian = empty_state(), None
        moved = inner.init(params)
        if tracks:
            spectral = tracker.init(params)
        elif mode == "spectral" and not _tracks_some(moved, params):
            raise ValueError(
                "rank must be an int of at least 1 where the optimizer tracks no bases "
                "of its own, got None"
            )
        elif mode == "eigen" and not is_placeholder(params):
            dim = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
            hessian = linalg.init_basis(max(dim, 1), 1, key=jax.random.key(seed))
        elif mode == "eigen":
            hessian = jnp.zeros(())  # type: ignore[assignment]
        return SamState(spectral, hessian, moved)

    def update_fn(
        updates: optax.Updates,
        state: SamState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[[optax.Params, int], optax.Updates] | None = None,
        refresh: bool | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SamState]:
        for name, given in (("params", params), ("grad_fn", grad_fn)):
            if given is None:
                raise ValueError(
                    f"spectral_sam needs {name}: call update(grads, state, params, "
                    "grad_fn=f) with f(params, i) the gradients at params"
                )
        assert grad_fn is not None
        hessian = state.hessian
        if hessian is not None:
            due = state.spectral.count % every == 0
            if refresh is not None:
                due = jnp.array(refresh)
            hessian = _follow_hessian(hessian, grad_fn, params, due)

        def ascend(
            updates: optax.Updates, state: SamState, params: optax.Params, extra: Any
        ) -> tuple[optax.Params, SpectralState]:
            spectral = tracker.update(
                state.spectral,
                updates,
                activations=extra.get("activations"),
                refresh=refresh,
            )
            along, vector = updates, None
            if mode == "spectral":
                spaces = spectral.spaces() if tracks else eigenspaces(state.inner)
                _require_one_a_side(spaces)
                along = projected(updates, spaces)
            if hessian is not None:
                vector = leading(hessian, updates)
            return perturb(params, along, rho, vector, alpha), spectral

        specs = lambda: specs_of((params, state.spectral))
        perturbed, spectral = with_auto_axes(
            ascend, updates, state, params, extra, out_specs=specs
        )
        grads = like(grad_fn(perturbed, 0), updates)
        if refresh is not None:
            extra["refresh"] = refresh
        moves, moved = inner.update(
            grads, state.inner, params, grad_fn=grad_fn, **extra
        )
        return moves, SamState(spectral, hessian, moved)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _tracks_some(state: optax.OptState, params: optax.Params) -> bool:
    """Whether an optimizer tracks bases; with nothing to track, whether it would."""
    states = spectral_states(state)
    if is_placeholder(params) or not matrix_views(params, None):
        return bool(states)
    return any(state.entries() for state in states)


def _require_one_a_side(spaces: Mapping[str, tuple[Eigenspace, ...]]) -> None:
    """Raises where a leaf has two eigenspaces on one side."""
    for path, found in spaces.items():
        if len({space.side for space in found}) < len(found):
            each = " and ".join(map(describe, found))
            raise ValueError(
                "inner must track one eigenspace of a leaf on each side, or "
                f"spectral_sam a rank of its own; of {path!r} it tracks {each}"
            )


def _follow_hessian(
    basis: EigenBasis, grad_fn: Callable[[Any, int], Any], params: Any, due: jax.Array
) -> EigenBasis:
    """The top eigenpair of the derivative of `grad_fn`, where it is due."""
    basis, params = jax.lax.stop_gradient((basis, params))

    def solve(basis: EigenBasis) -> EigenBasis:
        operator = linalg.gradient_jacobian(lambda p: grad_fn(p, 0), params)
        return linalg.refresh_basis(operator, basis, num_blocks=_HESSIAN_BLOCKS)

    wanted = batching.unbatched_max(due) > 0
    return jax.lax.cond(wanted, solve, lambda basis: basis, basis)
