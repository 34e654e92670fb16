"""Any optimizer on the coordinates of the gradient in each layer's eigenspace.

Its state costs k/d of what it would on whole kernels. When a basis is refreshed the
moments move along (`transport`), so that they go on describing the same directions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import batching, checks
from dsbp_jax.layers import leaves_by_path, map_paths
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.tracking import (
    SIDES,
    Coordinate,
    Eigenspace,
    LayoutLike,
    Number,
    Rule,
    SpectralState,
    Step,
    TrackedBasis,
    Tracker,
    array_leaves,
    from_coordinates,
    in_dtype,
    is_placeholder,
    rotation,
    to_coordinates,
    tracked,
    transport_moments,
    wide,
)


class SubspaceState(NamedTuple):
    """State of `spectral_subspace`.

    Attributes:
      spectral: The bases.
      inner: The state of the optimizer on coordinates.
      complement: Path to the norm of the last step outside the basis, shape
        `(*batch)`, float32 or wider; empty where its growth has no limit.
    """

    spectral: SpectralState
    inner: optax.OptState
    complement: dict[str, jax.Array]


def spectral_subspace(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    side: str = "input",
    source: str = "gradient",
    residual: Number = 0.0,
    max_growth: Number | None = None,
    refresh_every: int = 200,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: LayoutLike = None,
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
      side: `"input"` (each output keeps moments of its own), `"output"`, `"smaller"`
        (of each leaf the side of the smaller dimension) or `"both"`.
      source: As `spectral_projection`.
      residual: κ in [0, 1].
      max_growth: The norm of the complement's part of a matrix may grow by this factor
        from step to step at the most, at least 1 (Fira has 1.01). None is no limit.
      refresh_every: Steps between two refreshes of a leaf, the leaves in turn. Adam
        trained better with 200 than with 10 where it was measured.
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
      [P] Zhao et al., GaLore, ICML 2024, for the subspace; Robert et al., LDAdam, ICLR
      2025, for the moments; Chen et al., Fira, 2024, for the complement's scale and the
      limit of its growth.
      METHODS section 2.

    Example:
      >>> import dsbp_jax
      >>> tx = dsbp_jax.spectral_subspace(optax.adam(1e-3), rank=4)
      >>> params = {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}
      >>> state = tx.init(params)
      >>> state.inner[0].mu["kernel"].shape
      (4, 16)
      >>> updates, state = tx.update(params, state, params)
      >>> updates["kernel"].shape
      (32, 16)
    """
    checks.in_unit_interval("residual", residual)
    if max_growth is not None:
        checks.at_least_one("max_growth", max_growth)
    limits = max_growth is not None and not checks.is_static(residual, 0)
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
        needs_all=True,
    )

    def begin(params: optax.Params, spectral: SpectralState) -> SubspaceState:
        if is_placeholder(params):
            leaf: Any = jnp.zeros(())
            return SubspaceState(spectral, inner.init(params), leaf)
        spaces = spectral.spaces()

        # No optimizer that can follow a change of basis keeps more than their shapes.
        def zeros(path: str, leaf: Any) -> Any:
            if path not in spaces:
                return leaf
            thin = jax.eval_shape(lambda leaf: to_coordinates(leaf, spaces[path]), leaf)
            return vary(jnp.zeros(thin.shape, thin.dtype), varying_axes(leaf))

        leaves = array_leaves(params)
        norms = {
            path: jnp.zeros(found[0].solved.shape, wide(leaves[path].dtype))
            for path, found in (spaces.items() if limits else ())
        }
        return SubspaceState(spectral, inner.init(map_paths(zeros, params)), norms)

    def use(step: Step) -> tuple[optax.Updates, SubspaceState]:
        thin = _to_coordinates(step.updates, step.spaces)
        state = step.state.inner
        if step.refresh is not False:  # which is static
            state = _follow(step, thin, betas, transport)
        seen = step.params
        if seen is not None:
            seen = _to_coordinates(seen, step.spaces)
        moves, state = inner.update(thin, state, seen, **step.extra)
        norms = dict(step.state.complement)
        moved, seen = leaves_by_path(moves), leaves_by_path(thin)

        def lifted(path: str, leaf: Any) -> Any:
            spaces = step.spaces.get(path)
            if not spaces:
                return moved[path]
            view = spaces[0].view
            assert view is not None
            result = from_coordinates(moved[path], spaces, leaf)
            if not checks.is_static(residual, 0):
                part = _complement(leaf, moved[path], seen[path], spaces)
                part = in_dtype(residual, part.dtype) * part
                if max_growth is not None and path in norms:
                    part, norms[path] = _limited(part, norms[path], max_growth)
                result += part
            return view.from_matrix(result, leaf.shape).astype(leaf.dtype)

        updates = map_paths(lifted, step.updates)
        return updates, SubspaceState(step.spectral, state, norms)

    return tracked(tracker, use, begin=begin)


def _to_coordinates(tree: Any, spaces: Mapping[str, Sequence[Eigenspace]]) -> Any:
    """A tree with every leaf that has a basis in its coordinates."""
    change = lambda path, leaf: to_coordinates(leaf, spaces.get(path, ()))
    return map_paths(change, tree)


def _complement(
    gradient: jax.Array,
    move: jax.Array,
    thin: jax.Array,
    spaces: Sequence[Eigenspace],
) -> jax.Array:
    """What is outside, in the scale that the optimizer gives to what is inside.

    Args:
      gradient: G.
      move: What the optimizer made of its coordinates.
      thin: The coordinates S.
      spaces: Those of the leaf.

    Returns:
      `±(‖move‖ / ‖S‖) (G − lift(S))`, shape `(*batch, window, d_in, d_out)`.
    """
    view = spaces[0].view
    assert view is not None
    axes = tuple(range(len(view.batch_axes), move.ndim))
    scaled = _scaled(move, axes)[0] * _scaled(thin, axes)[0]
    before = _norm(thin, axes)
    ratio = _norm(move, axes) / jnp.where(before > 0, before, 1)
    ratio *= jnp.sign(jnp.sum(scaled, axes))
    inside = from_coordinates(thin, spaces, gradient)
    return _spread(ratio) * (view.to_matrix(gradient).astype(inside.dtype) - inside)


def _limited(
    part: jax.Array, last: jax.Array, max_growth: Number
) -> tuple[jax.Array, jax.Array]:
    """A complement whose norm has not grown too much, and that norm."""
    norm = _norm(part, (-3, -2, -1))
    # The first step has nothing to compare with.
    bound = jnp.where(last > 0, in_dtype(max_growth, last.dtype) * last, norm)
    new = jnp.minimum(norm, bound)
    scaled = part * _spread(new / jnp.where(norm > 0, norm, 1))
    return scaled, new.astype(last.dtype)


def _scaled(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Float64 divided by the largest entry, whose square may not be; and that entry."""
    if x.dtype.itemsize <= 4:
        return x, jnp.ones((), x.dtype)
    x_max = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True))
    largest = jnp.where(x_max > 0, x_max, 1)
    return x / largest, largest.squeeze(axes)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Euclidean norm; its derivative at zero is zero, as meta-learning needs."""
    x, largest = _scaled(x, axes)
    square = jnp.sum(x**2, axes)
    root = jnp.sqrt(jnp.where(square > 0, square, 1))
    return largest * jnp.where(square > 0, root, 0)


def _spread(x: jax.Array) -> jax.Array:
    return x[..., None, None, None]


@jax.jit  # traced once for all leaves of a shape
def _turn(old: TrackedBasis, new: TrackedBasis) -> jax.Array:
    """`V'ᵀV` where a leaf was refreshed, the identity elsewhere."""
    refreshed = new.refreshes > old.refreshes
    turned = rotation(new.vectors, old.vectors)
    identity = jnp.eye(turned.shape[-1], dtype=turned.dtype)
    return jnp.where(refreshed[..., None, None], turned, identity)


def _follow(
    step: Step,
    thin: optax.Updates,
    betas: tuple[float, float],
    rules: Mapping[str, Rule] | None,
) -> optax.OptState:
    """The inner state in the new bases; untouched where none was refreshed."""
    old, new = step.state.spectral.entries(), step.spectral.entries()
    if not new:
        return step.state.inner
    turns = {
        key: _turn(old[key]._replace(label=None), entry._replace(label=None))
        for key, entry in new.items()
    }

    def move(path: str, leaf: Any) -> Coordinate | None:
        left, right = (turns.get((side, path)) for side in SIDES)
        if left is None and right is None:
            return None
        return Coordinate(leaf.shape, left, right)

    moves = map_paths(move, thin)
    counts = lambda entries: jnp.concatenate(
        [entries[key].refreshes.ravel() for key in new]
    )
    some = jnp.any(counts(new) > counts(old))
    leaves, structure = jax.tree.flatten(step.state.inner)
    moving: list[int] = []

    def run() -> list[jax.Array]:
        moved = transport_moments(step.state.inner, moves, betas=betas, rules=rules)
        pairs = enumerate(zip(jax.tree.leaves(moved), leaves, strict=True))
        found = {index: new for index, (new, old) in pairs if new is not old}
        moving[:] = list(found)  # the others are no business of the branches
        return list(found.values())

    keep = lambda: [leaves[index] for index in moving]
    flag = batching.unbatched_max(some) > 0
    for index, leaf in zip(moving, jax.lax.cond(flag, run, keep), strict=True):
        leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)
