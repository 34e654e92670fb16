"""Spectral transfer: fine-tuning that spares what a source task made of each layer.

Along the eigenvectors e of a layer's input covariance on the source data, with their
eigenvalues λ, the penalty

    μ Σᵢ λᵢ ‖eᵢᵀ(W − W₀)‖²

is the mean squared change that fine-tuning makes to the layer's response there. The
strict form of the same forbids steps in the source's eigenspace altogether.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import map_paths, require_paths
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import (
    Eigenspace,
    LayoutLike,
    Number,
    Spaces,
    array_leaves,
    check_layout,
    in_dtype,
    is_placeholder,
    labelled,
    require_params,
    require_some,
    wide,
)
from dsbp_jax.transforms.decay import add_decay


class SourceState(NamedTuple):
    """What a transformation holds of a source task; never changes.

    Attributes:
      params: A tree like the params with the source kernels W₀, None where a leaf is
        free; None for `project_away`.
      bases: Canonical path to source eigenbasis.
    """

    params: optax.Params | None
    bases: dict[str, EigenBasis]


def spectral_transfer_penalty(
    strength: Number,
    source_params: optax.Params,
    source_bases: Spaces,
    *,
    layout: LayoutLike = None,
) -> Callable[[Any], jax.Array]:
    """The penalty `μ Σᵢ λᵢ ‖eᵢᵀ(W − W₀)‖²` as a function to add to a loss.

    Args:
      strength: μ, at least 0.
      source_params: The params W₀ at the end of the source task; at least the leaves
        that have a basis.
      source_bases: Input-side eigenspaces by canonical path, as `activation_bases`
        gives them on source data, or `dsbp_jax.eigenspaces(opt_state)` of an optimizer
        that tracked activations. Leaves without one are free.
      layout: As `dsbp_jax.spectral_projection`.

    Returns:
      A function from params to a scalar, float32; differentiable.

    Raises:
      ValueError: An argument is out of its range; in the function, bases or source
        params do not fit the params.

    References:
      [O] This project's design, after Li et al., L2-SP, ICML 2018, which has
      `μ‖W − W₀‖²`.
      METHODS section 7.

    Example:
      >>> import dsbp_jax
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> source = {"kernel": jnp.zeros((2, 3))}
      >>> penalty = spectral_transfer_penalty(0.5, source, {"kernel": basis})
      >>> penalty({"kernel": jnp.ones((2, 3))}).item()
      6.0
    """
    checks.non_negative("strength", strength)
    require_some("source_bases", source_bases)
    check_layout(layout)

    def penalty(params: optax.Params) -> jax.Array:
        source = _source(params, source_params, source_bases, layout)
        total = jnp.zeros((), jnp.float32)
        spaces = _spaces(params, source_bases, layout, source)
        for path, change in _change(params, source).items():
            space = spaces[path]
            along = jnp.sum(space.coordinates(change) ** 2, axis=(-3, -1))
            total += jnp.sum(space.values * along.astype(jnp.float32))
        return in_dtype(strength, total.dtype) * total

    return penalty


def add_spectral_transfer(
    strength: Number,
    source_params: optax.Params,
    source_bases: Spaces,
    *,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `spectral_transfer_penalty` to the updates.

    Like `optax.add_decayed_weights` it belongs before the learning rate's scaling. A
    step shrinks `eᵢᵀ(W − W₀)` by the factor `1 − 2ημλᵢ`: keep `2ημλ₁` under 1.

    Args:
      strength: μ, at least 0.
      source_params: As `spectral_transfer_penalty`; kept in the state.
      source_bases: As there; kept in the state.
      layout: As `dsbp_jax.spectral_projection`.

    Returns:
      A transformation; `update` needs params.

    Raises:
      ValueError: An argument is out of its range; in `init`, bases or source params do
        not fit; in `update`, params are missing.

    References:
      As `spectral_transfer_penalty`.

    Example:
      >>> import dsbp_jax
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> source = {"kernel": jnp.zeros((2, 3))}
      >>> tx = dsbp_jax.add_spectral_transfer(0.5, source, {"kernel": basis})
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> grads = {"kernel": jnp.zeros((2, 3))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"])
      [[4. 4. 4.]
       [0. 0. 0.]]
    """
    checks.non_negative("strength", strength)
    require_some("source_bases", source_bases)
    check_layout(layout)

    def init_fn(params: optax.Params) -> SourceState:
        return _source(params, source_params, source_bases, layout)

    @keep_shardings
    def update_fn(
        updates: optax.Updates,
        state: SourceState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SourceState]:
        del extra
        require_params("add_spectral_transfer", params)
        # Twice the spectral decay, of what has changed.
        change = _change(params, state)
        spaces = _spaces(params, source_bases, layout, state)
        return add_decay(updates, change, spaces, 2 * strength), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project_away(
    source_bases: Spaces,
    *,
    energy: Number | None = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes the part of every update that lies in a source eigenspace: `G − VVᵀG`.

    A layer's response to source inputs in span V then stays exactly as it is. Put it
    last in a chain: what follows it may leave the complement again.

    Args:
      source_bases: As `spectral_transfer_penalty`; kept in the state.
      energy: Protect only the leading columns that hold this share of the trace.
      layout: As `dsbp_jax.spectral_projection`.

    Returns:
      A transformation.

    Raises:
      ValueError: An argument is out of its range; in `init`, bases do not fit.

    References:
      [P] Saha, Garg and Roy, Gradient projection memory, ICLR 2021.
      METHODS section 7.

    Example:
      >>> import dsbp_jax
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> tx = dsbp_jax.project_away({"kernel": basis})
      >>> grads = {"kernel": jnp.ones((2, 3))}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["kernel"])
      [[0. 0. 0.]
       [1. 1. 1.]]
    """
    if energy is not None:
        checks.in_unit_interval("energy", energy, open_left=True)
    require_some("source_bases", source_bases)
    check_layout(layout)

    def init_fn(params: optax.Params) -> SourceState:
        return _source(params, None, source_bases, layout)

    @keep_shardings
    def update_fn(
        updates: optax.Updates,
        state: SourceState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SourceState]:
        del extra
        tree = updates if params is None else params
        spaces = _spaces(tree, source_bases, layout, state)

        def away(path: str, leaf: Any) -> Any:
            return spaces[path].outside(leaf, energy) if path in spaces else leaf

        return map_paths(away, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _source(
    params: optax.Params,
    source_params: optax.Params | None,
    source_bases: Spaces,
    layout: LayoutLike,
) -> SourceState:
    """What belongs to the leaves of the params, checked."""
    if is_placeholder(params):
        leaf: Any = jnp.zeros(())
        return SourceState(None if source_params is None else params, leaf)
    leaves = array_leaves(params)
    # Arrays of its own: a state may be donated, which the source is not.
    bases = {
        path: EigenBasis(*(jnp.array(x, jnp.float32) for x in space.basis))
        for path, space in _spaces(params, source_bases, layout).items()
    }
    if source_params is None:
        return SourceState(None, bases)
    source = array_leaves(source_params)
    require_paths(bases, source, "source_params")
    for path in bases:
        if jnp.shape(source[path]) != leaves[path].shape:
            raise ValueError(
                f"source_params must have shape {leaves[path].shape} at {path!r} to "
                f"fit the params, got {jnp.shape(source[path])}"
            )
    keep = lambda path, leaf: (
        jnp.array(source[path], leaf.dtype) if path in bases else None
    )
    return SourceState(map_paths(keep, params), bases)


def _spaces(
    params: optax.Params,
    source_bases: Spaces,
    layout: LayoutLike,
    state: SourceState | None = None,
) -> dict[str, Eigenspace]:
    """The source eigenspaces of the leaves of a tree, with the arrays of a state."""
    given = labelled(
        "source_bases",
        source_bases,
        params,
        layout,
        need="input",
        required=state is None,
    )
    spaces = {path: found[0] for path, found in given.items()}
    if state is None:
        return spaces
    return {
        path: dataclasses.replace(space, basis=basis, solved=basis.trace > 0)
        for path, space in spaces.items()
        if path in state.bases
        for basis in (state.bases[path],)
    }


def _change(params: optax.Params, source: SourceState) -> dict[str, jax.Array]:
    """`W − W₀` of the leaves that have a source basis, by path, float32 or wider."""
    leaves, start = array_leaves(params), array_leaves(source.params)
    widened = lambda leaf: leaf.astype(wide(leaf.dtype))
    return {
        path: widened(leaves[path]) - widened(start[path])
        for path in source.bases
        if path in leaves
    }
