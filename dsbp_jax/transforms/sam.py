"""Sharpness-aware minimisation: the gradient at the worst point nearby.

With g the gradient at w and ĝ = g/‖g‖ over all leaves together, the point is w + ε:

    full      ε = ρ ĝ
    spectral  ε = ρ Pg/‖Pg‖, P the projection on each layer's eigenspace
    eigen     ε = ρ (ĝ + α sign(gᵀv) (v − (ĝᵀv) ĝ)), v the Hessian's top eigenvector

`sam_value_and_grad` is an estimator of gradients, with the signature of what it wraps;
`spectral_sam` is a transformation that keeps P or v fresh in its own state.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from dsbp_jax import batching, checks, linalg
from dsbp_jax.layers import Layout
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import (
    SIDES,
    SpectralState,
    TrackedBasis,
    Tracker,
    check_bases,
    check_layout,
    is_placeholder,
    matrix_views,
    project_on,
    require_some,
    tracked_by_side,
)
from dsbp_jax.transforms.projection import project

MODES = ("full", "spectral", "eigen")

# The Hessian's product is the gradient's derivative: so many of them find its top
# eigenvector well enough, from a random start and from the last one alike.
_HESSIAN_BLOCKS = 8

ValueAndGrad = Callable[..., tuple[Any, ...]]


def sam_value_and_grad(
    value_and_grad_fn: ValueAndGrad,
    rho: float | jax.Array,
    *,
    mode: str = "full",
    bases: Mapping[str, EigenBasis] | EigenBasis | None = None,
    side: str = "output",
    alpha: float | jax.Array = 0.2,
    layout: Layout | Callable[[Any], Layout] | None = None,
) -> ValueAndGrad:
    """Takes the gradient at the worst point within ρ of w, to first order.

    Norms are over all leaves together. Where the gradient is zero there is no
    perturbation.

    Args:
      value_and_grad_fn: As `jax.value_and_grad` returns it; with `has_aux=True`
        its value is a pair. What it returns beyond value and gradient is passed on.
      rho: Radius ρ of the perturbation, at least 0.
      mode: `"full"` perturbs along the whole gradient, `"spectral"` inside each
        layer's eigenspace, `"eigen"` tilts it towards the Hessian's top eigenvector.
      bases: Eigenbases by canonical path for `"spectral"`, as `dsbp_jax.bases` reads
        them from an optimizer's state; leaves without one are perturbed along their
        whole gradient. For `"eigen"` an eigenbasis of `linalg.hessian`, of which the
        first column counts.
      side: The side of the bases, `"input"` or `"output"`.
      alpha: α of `"eigen"`, at least 0.
      layout: Matrix views of the leaves, as `dsbp_jax.spectral_projection`.

    Returns:
      A function of the same arguments. The value (and all else) it returns is that at
      w, the gradient is that at the perturbed point.

    Raises:
      ValueError: An argument is out of its range, or `bases` do not suit the mode; in
        the function, they do not fit the params.

    References:
      Foret et al., Sharpness-aware minimization, ICLR 2021; Luo et al., Explicit
      eigenvalue regularization improves SAM, NeurIPS 2024, for `"eigen"`; `"spectral"`
      is this project's design.

    Example:
      >>> import jax, dsbp_jax
      >>> loss_fn = lambda w: 0.5 * w**2
      >>> estimate = dsbp_jax.sam_value_and_grad(jax.value_and_grad(loss_fn), rho=0.5)
      >>> value, grad = estimate(1.0)
      >>> print(value, grad)
      0.5 1.5
    """
    checks.non_negative("rho", rho)
    checks.one_of("mode", mode, MODES)
    checks.one_of("side", side, SIDES)
    checks.non_negative("alpha", alpha)
    check_layout(layout)
    wanted = {
        "full": (bases is None, "None with mode='full'"),
        "spectral": (
            isinstance(bases, Mapping),
            "a dict from path to EigenBasis with mode='spectral'",
        ),
        "eigen": (
            isinstance(bases, EigenBasis) and bases.vectors.ndim == 2,
            "an EigenBasis of linalg.hessian with mode='eigen'",
        ),
    }
    if isinstance(bases, Mapping):
        require_some("bases", bases)
    fits, accepted = wanted[mode]
    if not fits:
        raise ValueError(f"bases must be {accepted}, got {_short(bases)}")

    def estimate(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        value, grads, *rest = value_and_grad_fn(params, *args, **kwargs)
        along, vector = grads, None
        if isinstance(bases, EigenBasis):
            vector = _leading(bases, grads)
        elif bases is not None:
            views = matrix_views(params, layout)
            check_bases("bases", bases, params, views, side)
            along = project_on(grads, bases, views, side)
        perturbed = _perturb(params, along, rho, vector, alpha)
        _, grads, *_ = value_and_grad_fn(perturbed, *args, **kwargs)
        return (value, grads, *rest)

    return estimate


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
    inner: Any


def spectral_sam(
    inner: optax.GradientTransformation,
    rho: float | jax.Array,
    *,
    mode: str = "spectral",
    rank: int | None = None,
    source: str = "gradient",
    side: str = "output",
    alpha: float | jax.Array = 0.2,
    refresh_every: int | None = None,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: Layout | Callable[[Any], Layout] | None = None,
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
      source: As `spectral_projection`.
      side: `"input"`, `"output"` or `"both"`.
      alpha: As `sam_value_and_grad`.
      refresh_every: Steps between two refreshes; by default 10 of a leaf's basis, the
        leaves in turn, and 100 of the Hessian's eigenvector.
      num_blocks: As `spectral_projection`; so are those below.
      tolerance: See there.
      layout: See there.
      seed: See there.

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

    def init_fn(params: Any) -> SamState:
        spectral, hessian = SpectralState(jnp.zeros((), jnp.int32), {}), None
        moved = inner.init(params)
        if tracks:
            spectral = tracker.init(params)
        elif mode == "spectral" and tracked_by_side(moved) is None:
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
        updates: Any,
        state: SamState,
        params: Any = None,
        *,
        grad_fn: Callable[[Any, int], Any] | None = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SamState]:
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
        held = None
        if mode == "spectral" and not tracks:
            held = tracked_by_side(state.inner)
        perturbed, spectral = ascend(
            updates,
            state.spectral,
            params,
            hessian=hessian,
            held=held,
            refresh=refresh,
            **extra_args,
        )
        grads = grad_fn(perturbed, 0)
        if refresh is not None:
            extra_args["refresh"] = refresh
        moves, moved = inner.update(
            grads, state.inner, params, grad_fn=grad_fn, **extra_args
        )
        return moves, SamState(spectral, hessian, moved)

    @keep_shardings
    def ascend(
        updates: Any,
        spectral: SpectralState,
        params: Any,
        *,
        hessian: EigenBasis | None,
        held: dict[str, dict[str, TrackedBasis]] | None,
        activations: Any = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SpectralState]:
        """The perturbed params."""
        del extra_args
        views = tracker.views(params)
        spectral = tracker.update(
            spectral, updates, views, activations=activations, refresh=refresh
        )
        bases = spectral if held is None else SpectralState(spectral.count, held)
        along = project(updates, bases, views, residual=0.0)
        vector = None if hessian is None else _leading(hessian, updates)
        return _perturb(params, along, rho, vector, alpha), spectral

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _perturb(
    params: Any,
    along: Any,
    rho: float | jax.Array,
    vector: Any = None,
    alpha: float | jax.Array = 0.0,
) -> Any:
    """`w + ε`.

    Args:
      params: w.
      along: The direction, g or Pg; a leaf may be None, where w stays.
      rho: ρ.
      vector: v, a tree like `along`, or None for α = 0.
      alpha: α.

    Returns:
      The perturbed params; the step has the gradients' dtype.
    """
    # Scaled by the largest entry: squares would lose 1e±30.
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), along)
    entries = [jnp.max(jnp.abs(g), initial=0) for g in jax.tree.leaves(wide)]
    largest = functools.reduce(jnp.maximum, entries, jnp.float32(0))
    unit = optax.tree.scale(1 / jnp.where(largest > 0, largest, 1), wide)
    norm = optax.tree.norm(unit)
    unit = optax.tree.scale(1 / jnp.where(norm > 0, norm, 1), unit)
    if vector is not None:
        cosine = optax.tree.vdot(unit, vector)
        tilt = lambda g, v: g + alpha * jnp.sign(cosine) * (v - cosine * g)
        unit = jax.tree.map(tilt, unit, vector)

    def move(direction: jax.Array | None, grad: Any, param: Any) -> Any:
        if direction is None:  # not differentiated, such as a function in the tree
            return param
        return param + (rho * direction).astype(grad.dtype)

    return jax.tree.map(move, unit, along, params, is_leaf=lambda leaf: leaf is None)


def _leading(basis: EigenBasis, grads: Any) -> Any:
    """The first column of a basis of the Hessian, as a tree like the gradients."""
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    flat, unravel = ravel_pytree(wide)
    if basis.vectors.shape[0] != flat.size:
        raise ValueError(
            f"bases must be of the Hessian of all {flat.size} parameters, got vectors "
            f"of shape {basis.vectors.shape}"
        )
    return unravel(basis.vectors[:, 0])


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


def _short(bases: Any) -> str:
    """What was passed as bases, in a word or two."""
    return "None" if bases is None else type(bases).__name__
