"""Sharpness-aware minimisation: the gradient at the worst point nearby.

With g the gradient at w and ĝ = g/‖g‖ over all leaves together, the point is w + ε:

    full      ε = ρ ĝ
    spectral  ε = ρ Pg/‖Pg‖, P the projection on each layer's eigenspace
    eigen     ε = ρ (ĝ + α sign(gᵀv) (v − (ĝᵀv) ĝ)), v the Hessian's top eigenvector

`sam_value_and_grad` is an estimator of gradients, with the signature of what it wraps.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from dsbp_jax import checks
from dsbp_jax.layers import map_paths
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking import (
    SIDES,
    Eigenspace,
    LayoutLike,
    Number,
    Spaces,
    check_layout,
    in_dtype,
    labelled,
    project,
    require_some,
    wide,
)

MODES = ("full", "spectral", "eigen")

ValueAndGrad = Callable[..., tuple[Any, ...]]


def sam_value_and_grad(
    value_and_grad_fn: ValueAndGrad,
    rho: Number,
    *,
    mode: str = "full",
    bases: Spaces | EigenBasis | None = None,
    side: str | None = None,
    alpha: Number = 0.2,
    layout: LayoutLike = None,
) -> ValueAndGrad:
    """Takes the gradient at the worst point within ρ of w, to first order.

    Norms are over all leaves together, of complex ones over both parts. Where the
    gradient is zero there is no perturbation. Parameters of less than float32 could not
    hold a small one: the perturbed ones are float32 there, and so is what is computed
    from them; gradients come back in their own dtype.

    Args:
      value_and_grad_fn: As `jax.value_and_grad` returns it; with `has_aux=True`
        its value is a pair. What it returns beyond value and gradient is passed on.
      rho: Radius ρ of the perturbation, at least 0.
      mode: `"full"` perturbs along the whole gradient, `"spectral"` inside each
        layer's eigenspace, `"eigen"` tilts it towards the Hessian's top eigenvector.
      bases: Eigenspaces by canonical path for `"spectral"`, as `dsbp_jax.eigenspaces`
        reads them from an optimizer's state; leaves without one are perturbed along
        their whole gradient. For `"eigen"` an eigenbasis of `linalg.hessian`, of which
        the first column counts.
      side: `"input"`, `"output"` or `"both"`, where a leaf has eigenspaces on both
        sides; the side of bases without a label. None takes the one that there is.
      alpha: α of `"eigen"`, at least 0.
      layout: Matrix views of leaves whose bases have no label, from `dsbp_jax.layout`.

    Returns:
      A function of the same arguments. The value (and all else) it returns is that at
      w, the gradient is that at the perturbed point.

    Raises:
      ValueError: An argument is out of its range, or `bases` do not suit the mode; in
        the function, they do not fit the params.

    References:
      [P] Foret et al., Sharpness-aware minimization, ICLR 2021; Luo et al., Explicit
      eigenvalue regularization improves SAM, NeurIPS 2024, for `"eigen"`; `"spectral"`
      is this project's design [O].
      METHODS section 4.

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
    checks.non_negative("alpha", alpha)
    check_layout(layout)
    if side is not None:
        checks.one_of("side", side, (*SIDES, "both"))
    wanted = {
        "full": (bases is None, "None with mode='full'"),
        "spectral": (
            isinstance(bases, Mapping),
            "a dict from path to Eigenspace with mode='spectral'",
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
            vector = leading(bases, grads)
        elif bases is not None:
            spaces = labelled("bases", bases, params, layout, side=side)
            along = projected(grads, spaces)
        perturbed = perturb(params, along, rho, vector, alpha)
        _, ascended, *_ = value_and_grad_fn(perturbed, *args, **kwargs)
        return (value, like(ascended, grads), *rest)

    return estimate


def projected(
    grads: optax.Updates,
    spaces: Mapping[str, tuple[Eigenspace, ...]],
    residual: Number = 0.0,
) -> optax.Updates:
    """Gradients inside the eigenspaces of their leaves; those of other leaves whole.

    Args:
      grads: A tree of them.
      spaces: Path to the eigenspaces of a leaf, on different sides.
      residual: The share of what is outside that is kept.
    """
    return map_paths(
        lambda path, leaf: project(leaf, spaces.get(path, ()), residual), grads
    )


def like(grads: optax.Updates, first: optax.Updates) -> optax.Updates:
    """Gradients at wider params, in the dtypes of the first ones."""
    return jax.tree.map(
        lambda g, like: jnp.asarray(g, jnp.result_type(like)), grads, first
    )


def perturb(
    params: optax.Params,
    along: optax.Updates,
    rho: Number,
    vector: Any = None,
    alpha: Number = 0.0,
) -> optax.Params:
    """`w + ε`.

    Args:
      params: w.
      along: The direction of ascent, g or Pg; a leaf may be None, where w stays.
      rho: ρ.
      vector: v, a tree like `along`, or None for α = 0.
      alpha: α.

    Returns:
      The perturbed params, float32 where w was less.
    """
    widened = lambda g: jnp.asarray(g, wide(jnp.result_type(g)))
    unit = jax.tree.map(widened, along)
    # Scaled by the largest entry: squares would lose 1e±30.
    entries = [jnp.max(jnp.abs(g), initial=0) for g in jax.tree.leaves(unit)]
    dtype = wide(*(entry.dtype for entry in entries))
    zero = jnp.zeros((), dtype)
    largest = functools.reduce(jnp.maximum, [e.astype(dtype) for e in entries], zero)
    unit = _scaled(unit, 1 / jnp.where(largest > 0, largest, 1))
    squares = [jnp.sum(jnp.abs(g) ** 2).astype(dtype) for g in jax.tree.leaves(unit)]
    norm = jnp.sqrt(sum(squares, start=zero))
    unit = _scaled(unit, 1 / jnp.where(norm > 0, norm, 1))
    if vector is not None:
        cosine = optax.tree.vdot(unit, vector)
        factor = in_dtype(alpha, cosine.dtype) * jnp.sign(cosine)
        unit = jax.tree.map(lambda g, v: g + factor * (v - cosine * g), unit, vector)

    def move(direction: jax.Array | None, param: Any) -> Any:
        if direction is None:  # not differentiated, such as a function in the tree
            return param
        step = in_dtype(rho, direction.dtype) * direction
        dtype = wide(jnp.result_type(param), direction.dtype)
        return jnp.asarray(param, dtype) + step.astype(dtype)

    return jax.tree.map(move, unit, params, is_leaf=lambda leaf: leaf is None)


def _scaled(tree: Any, factor: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)


def leading(basis: EigenBasis, grads: Any) -> Any:
    """The first column of a basis of the Hessian, as a tree like the gradients."""
    wide = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    flat, unravel = ravel_pytree(wide)
    if basis.vectors.shape[0] != flat.size:
        raise ValueError(
            f"bases must be of the Hessian of all {flat.size} parameters, got vectors "
            f"of shape {basis.vectors.shape}"
        )
    return unravel(basis.vectors[:, 0])


def _short(bases: Any) -> str:
    """What was passed as bases, in a word or two."""
    return "None" if bases is None else type(bases).__name__
