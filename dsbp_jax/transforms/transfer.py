"""Spectral transfer: fine-tuning that spares what a source task made of each layer.

Along the eigenvectors e of a layer's input covariance on the source data, with their
eigenvalues λ, the penalty

    μ Σᵢ λᵢ ‖eᵢᵀ(W − W₀)‖²

is the mean squared change that fine-tuning makes to the layer's response there. The
strict form of the same forbids steps in the source's eigenspace altogether.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import Layout, leaves_by_path, map_paths, require_paths
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import (
    check_bases,
    check_layout,
    is_placeholder,
    matrix_views,
    project_on,
    require_some,
)
from dsbp_jax.transforms.decay import add_decay


class SourceState(NamedTuple):
    """What a transformation holds of a source task; never changes.

    Attributes:
      params: A tree like the params with the source kernels W₀, None where a leaf is
        free; None for `project_away`.
      bases: Canonical path to source eigenbasis.
    """

    params: Any
    bases: dict[str, EigenBasis]


def spectral_transfer_penalty(
    strength: float | jax.Array,
    source_params: Any,
    source_bases: Mapping[str, EigenBasis],
    *,
    layout: Layout | Callable[[Any], Layout] | None = None,
) -> Callable[[Any], jax.Array]:
    """The penalty `μ Σᵢ λᵢ ‖eᵢᵀ(W − W₀)‖²` as a function to add to a loss.

    Args:
      strength: μ, at least 0.
      source_params: The params W₀ at the end of the source task; at least the leaves
        that have a basis.
      source_bases: Input-side eigenbases by canonical path, as `activation_bases`
        gives them on source data, or `dsbp_jax.bases(state, side="input")` of an
        optimizer that tracked activations. Leaves without one are free.
      layout: As `dsbp_jax.spectral_projection`.

    Returns:
      A function from params to a scalar, float32; differentiable.

    Raises:
      ValueError: An argument is out of its range; in the function, bases or source
        params do not fit the params.

    References:
      This project's design, after Li et al., L2-SP, ICML 2018, which has
      `μ‖W − W₀‖²`.

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

    def penalty(params: Any) -> jax.Array:
        source = _source(params, source_params, source_bases, layout)
        return _penalty(params, source, strength, layout)

    return penalty


def add_spectral_transfer(
    strength: float | jax.Array,
    source_params: Any,
    source_bases: Mapping[str, EigenBasis],
    *,
    layout: Layout | Callable[[Any], Layout] | None = None,
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

    def init_fn(params: Any) -> SourceState:
        return _source(params, source_params, source_bases, layout)

    @keep_shardings
    def update_fn(
        updates: Any, state: SourceState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SourceState]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_spectral_transfer needs params: call update(grads, state, params)"
            )
        # Twice the spectral decay, of what has changed.
        change = _change(params, state)
        views = matrix_views(params, layout)
        terms = (change, state.bases, views, 2 * strength, "input", None)
        return add_decay(updates, *terms), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project_away(
    source_bases: Mapping[str, EigenBasis],
    *,
    energy: float | jax.Array | None = None,
    layout: Layout | Callable[[Any], Layout] | None = None,
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
      Saha, Garg and Roy, Gradient projection memory, ICLR 2021.

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

    def init_fn(params: Any) -> SourceState:
        return _source(params, None, source_bases, layout)

    @keep_shardings
    def update_fn(
        updates: Any, state: SourceState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SourceState]:
        del extra_args
        views = matrix_views(updates if params is None else params, layout)
        away = project_on(
            updates, state.bases, views, "input", energy=energy, away=True
        )
        return away, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _source(
    params: Any,
    source_params: Any,
    source_bases: Mapping[str, EigenBasis],
    layout: Layout | Callable[[Any], Layout] | None,
) -> SourceState:
    """What belongs to the leaves of the params, checked."""
    if is_placeholder(params):
        leaf: Any = jnp.zeros(())
        return SourceState(None if source_params is None else params, leaf)
    views, leaves = matrix_views(params, layout), leaves_by_path(params)
    check_bases("source_bases", source_bases, params, views, "input")
    # Arrays of its own: a state may be donated, which the source is not.
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)
    bases = {path: copy(source_bases[path]) for path in views if path in source_bases}
    if source_params is None:
        return SourceState(None, bases)
    source = leaves_by_path(source_params)
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


def _penalty(
    params: Any,
    source: SourceState,
    strength: float | jax.Array,
    layout: Layout | Callable[[Any], Layout] | None,
) -> jax.Array:
    views, changes = matrix_views(params, layout), _change(params, source)
    total = jnp.zeros((), jnp.float32)
    for path, change in changes.items():
        e, values = source.bases[path].vectors, source.bases[path].values
        matrix = views[path].to_matrix(change)
        with jax.default_matmul_precision("highest"):
            along = jnp.sum((e[..., None, :, :].mT @ matrix) ** 2, (-3, -1))
        total += jnp.sum(values * along)
    return strength * total


def _change(params: Any, source: SourceState) -> dict[str, jax.Array]:
    """`W − W₀` of the leaves that have a source basis, by path, float32."""
    leaves, start = leaves_by_path(params), leaves_by_path(source.params)
    wide = lambda leaf: leaf.astype(jnp.float32)
    return {
        path: wide(leaves[path]) - wide(start[path])
        for path in source.bases
        if path in leaves
    }
