"""Any optimizer on the coordinates of the gradient in each layer's eigenspace.

Its state costs k/d of what it would on whole kernels. When a basis is refreshed the
moments move along (`transport`), so that they go on describing the same directions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import batching, checks
from dsbp_jax.layers import Layout, MatrixView, leaves_by_path, map_paths
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import (
    Coordinate,
    Rule,
    SpectralState,
    TrackedBasis,
    Tracker,
    rotation,
    transport_moments,
)


class SubspaceState(NamedTuple):
    """State of `spectral_subspace`.

    Attributes:
      spectral: The bases.
      inner: The state of the optimizer on coordinates.
      complement: Path to the norm of the last step outside the basis, shape
        `(*batch)`, float32; empty where its growth has no limit.
    """

    spectral: SpectralState
    inner: Any
    complement: dict[str, jax.Array]


def spectral_subspace(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    side: str = "smaller",
    source: str = "gradient",
    residual: float | jax.Array = 0.0,
    max_growth: float | jax.Array | None = None,
    rank_multiple_of: int | None = None,
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: Layout | Callable[[Any], Layout] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    transport: Mapping[str, Rule] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on the coordinates `VᵀG`, `GV` or `VᵀGU` of each kernel.

    The optimizer sees coordinates in place of gradients and of params, and its updates
    are lifted back; leaves without a basis it sees whole. Updates stay in the span of
    the bases, unless `residual` adds the complement of the gradient, scaled as the
    optimizer scales what is inside:

        update = lift(u) + κ (‖u‖ / ‖S‖) (G − lift(S)),   S the coordinates of G,

    with the sign that u has to S, for each matrix of a stack.

    Args:
      inner: Any Optax transformation. Its own state must be one that can follow a
        change of basis (see `transport`).
      rank: Columns k of each basis; a side of dimension `d ≤ k` is not projected.
      side: `"smaller"` (of each leaf the side of the smaller dimension, of which k
        columns hold the most), `"input"`, `"output"` or `"both"`.
      source: As `spectral_projection`.
      residual: κ in [0, 1].
      max_growth: The norm of the complement's part of a matrix may grow by this factor
        from step to step at the most, at least 1 (Fira has 1.01). None is no limit.
      rank_multiple_of: The rank is raised to a multiple of this, so that coordinates
        can be sharded evenly over so many devices.
      refresh_every: Steps between two refreshes of a leaf, the leaves in turn.
      num_blocks: Krylov blocks of a refresh.
      tolerance: Only rotate a basis while its relative residual is at most this.
      layout: As `spectral_projection`.
      betas: Decay rates of the inner optimizer's moments, for their bias correction.
      transport: As `dsbp_jax.spectral_coordinates`.
      seed: Of the bases' random start.

    Returns:
      A transformation; `dsbp_jax.bases` finds the bases in its state. `update` also
      takes `refresh=True` or `False` (static), and `activations`.

    Raises:
      ValueError: An argument is out of its range; in `update`, the inner state cannot
        follow a change of basis.

    References:
      Zhao et al., GaLore, ICML 2024, for the subspace; Robert et al., LDAdam, ICLR
      2025, for the moments; Chen et al., Fira, 2024, for the complement's scale and the
      limit of its growth.

    Example:
      >>> import dsbp_jax
      >>> tx = dsbp_jax.spectral_subspace(optax.adam(1e-3), rank=4)
      >>> params = {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}
      >>> state = tx.init(params)
      >>> state.inner[0].mu["kernel"].shape
      (32, 4)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (32, 16)
    """
    checks.in_unit_interval("residual", residual)
    if max_growth is not None:
        checks.at_least_one("max_growth", max_growth)
    limits = max_growth is not None and not checks.is_static(residual, 0)
    multiple = 1
    if rank_multiple_of is not None:
        multiple = checks.positive_int("rank_multiple_of", rank_multiple_of)
    rank = -(-checks.positive_int("rank", rank) // multiple) * multiple
    inner = optax.with_extra_args_support(inner)
    tracker = Tracker(
        rank=rank,
        source=source,
        side=side,
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
    )

    def init_fn(params: Any) -> SubspaceState:
        spectral = tracker.init(params)
        if not isinstance(spectral.tracked, dict):  # a placeholder
            leaf: Any = jnp.zeros(())
            return SubspaceState(spectral, inner.init(params), leaf)
        views = tracker.views(params)
        bare = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        shapes = jax.eval_shape(
            lambda params, state: _to_coordinates(params, state, views),
            *jax.tree.map(bare, (params, spectral)),
        )
        # No optimizer that can follow a change of basis keeps more than their shapes.
        zeros = lambda like, leaf: (
            leaf if like.shape == leaf.shape else jnp.zeros(like.shape, like.dtype)
        )
        norms = {
            path: jnp.zeros(entry.refreshes.shape, jnp.float32)
            for entries in (spectral.tracked.values() if limits else ())
            for path, entry in entries.items()
        }
        coordinates = jax.tree.map(zeros, shapes, params)
        return SubspaceState(spectral, inner.init(coordinates), norms)

    @keep_shardings
    def update_fn(
        updates: Any,
        state: SubspaceState,
        params: Any = None,
        *,
        activations: Any = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SubspaceState]:
        views = tracker.views(updates if params is None else params)
        spectral = tracker.update(
            state.spectral, updates, views, activations=activations, refresh=refresh
        )
        coordinates = _to_coordinates(updates, spectral, views)
        moved = state.inner
        if refresh is not False:  # which is static
            moved = _follow(state, spectral, coordinates, betas, transport)
        seen = None if params is None else _to_coordinates(params, spectral, views)
        moves, moved = inner.update(coordinates, moved, seen, **extra_args)
        norms = dict(state.complement)
        lifted = _lift(
            moves, updates, coordinates, spectral, views, residual, max_growth, norms
        )
        return lifted, SubspaceState(spectral, moved, norms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _to_coordinates(
    tree: Any, state: SpectralState, views: Mapping[str, MatrixView]
) -> Any:
    """A tree with every leaf that has a basis in its coordinates.

    Args:
      tree: Gradients or params.
      state: The bases.
      views: The matrix views of the leaves.

    Returns:
      The tree, coordinates of shape `(*batch, [window,] k, d_out)` (the input side)
      or `(*batch, [window,] d_in, k)`, float32; other leaves as they are.
    """

    def change(path: str, leaf: jax.Array) -> jax.Array:
        held = _held(state, path)
        if not held:
            return leaf
        matrix = views[path].to_matrix(leaf).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            for side, entry in held.items():
                basis = entry.basis.vectors[..., None, :, :]
                matrix = basis.mT @ matrix if side == "input" else matrix @ basis
        # The axis of taps is kept only where there are some.
        return matrix.squeeze(-3) if matrix.shape[-3] == 1 else matrix

    return map_paths(change, tree)


def _lift(
    moves: Any,
    updates: Any,
    coordinates: Any,
    state: SpectralState,
    views: Mapping[str, MatrixView],
    residual: float | jax.Array,
    max_growth: float | jax.Array | None,
    norms: dict[str, jax.Array],
) -> Any:
    """The inverse of `_to_coordinates` for an optimizer's updates.

    Args:
      moves: What the optimizer makes of `coordinates`.
      updates: The gradients, for shapes, dtypes and the complement.
      coordinates: Theirs.
      state: The bases.
      views: The matrix views of the leaves.
      residual: The share of the complement.
      max_growth: How far its norm may grow in a step.
      norms: Those of the last step by path, of which this leaves the new ones.

    Returns:
      Updates shaped like the gradients.
    """
    moved, seen = leaves_by_path(moves), leaves_by_path(coordinates)

    def change(path: str, leaf: jax.Array) -> jax.Array:
        held, view = _held(state, path), views.get(path)
        if not held or view is None:
            return moved[path]
        shape = view.matrix_shape(leaf.shape)

        def whole(matrix: jax.Array) -> jax.Array:
            if matrix.ndim < len(shape):
                matrix = jnp.expand_dims(matrix, -3)
            for side, entry in held.items():
                basis = entry.basis.vectors[..., None, :, :]
                matrix = basis @ matrix if side == "input" else matrix @ basis.mT
            return matrix

        def size(x: jax.Array) -> jax.Array:
            axes = tuple(range(len(view.batch_axes), x.ndim))
            return jnp.sqrt(jnp.sum(x**2, axes))

        def outside(move: jax.Array, coordinate: jax.Array) -> jax.Array:
            matrix = view.to_matrix(leaf).astype(jnp.float32)
            axes = tuple(range(len(view.batch_axes), move.ndim))
            sign = jnp.sign(jnp.sum(move * coordinate, axes))
            before = size(coordinate)
            ratio = size(move) / jnp.where(before > 0, before, 1)
            spread = lambda x: x[..., None, None, None]
            part = residual * spread(sign * ratio) * (matrix - whole(coordinate))
            if max_growth is None or path not in norms:
                return part
            norm, last = size(part), norms[path]
            # The first step has nothing to compare with.
            bound = jnp.where(last > 0, max_growth * last, norm)
            norms[path] = jnp.minimum(norm, bound)
            return part * spread(norms[path] / jnp.where(norm > 0, norm, 1))

        with jax.default_matmul_precision("highest"):
            move, coordinate = moved[path], seen[path]
            result = whole(move)
            if not checks.is_static(residual, 0):
                result += outside(move, coordinate)
        return view.from_matrix(result, leaf.shape).astype(leaf.dtype)

    return map_paths(change, updates)


def _held(state: SpectralState, path: str) -> dict[str, TrackedBasis]:
    """The tracked sides of a leaf."""
    return {
        side: entries[path]
        for side, entries in state.tracked.items()
        if path in entries
    }


def _follow(
    state: SubspaceState,
    spectral: SpectralState,
    coordinates: Any,
    betas: tuple[float, float],
    rules: Mapping[str, Rule] | None,
) -> Any:
    """The inner state in the new bases; untouched where none was refreshed."""
    moves: dict[str, Coordinate | None] = {}
    refreshed = []
    for path, leaf in leaves_by_path(coordinates).items():
        sides = {}
        for side, entry in _held(spectral, path).items():
            old = state.spectral.tracked[side][path]
            new = entry.refreshes > old.refreshes
            turned = rotation(entry.basis.vectors, old.basis.vectors)
            identity = jnp.eye(turned.shape[-1], dtype=turned.dtype)
            sides[side] = jnp.where(new[..., None, None], turned, identity)
            refreshed.append(jnp.any(new))
        left, right = sides.get("input"), sides.get("output")
        moves[path] = Coordinate(leaf.shape, left, right) if sides else None
    if not refreshed:
        return state.inner
    return jax.lax.cond(
        batching.unbatched_max(jnp.any(jnp.stack(refreshed))) > 0,
        lambda inner: transport_moments(inner, moves, betas=betas, rules=rules),
        lambda inner: inner,
        state.inner,
    )
