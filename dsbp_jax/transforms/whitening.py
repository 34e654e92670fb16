"""Spectral whitening: updates over a power of their own or their layer's spectrum.

Projection keeps the leading eigenspace of a layer and damps the rest. What trains is
the reverse: bring the leading directions down to the level of the rest. With power ½ of
an update's own spectrum the result has singular values that are alike, which is
Muon's step; a low-rank basis and the mean of the rest give it for two thin products.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks, linalg
from dsbp_jax.layers import MatrixView, map_paths
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.stacks import unstacked
from dsbp_jax.tracking import (
    SIDES,
    Eigenspace,
    Factors,
    Followed,
    LayoutLike,
    Number,
    SpectralFilter,
    SpectralState,
    Tracker,
    array_leaves,
    as_matrices,
    follow_updates,
    nearly_diagonal,
    squared_norm,
    tracked,
    whole_space,
)

Size = tuple[int, int] | None

#: Path to the shape `(a, b)` of the kernel behind coordinates.
Sizes = Mapping[str, tuple[int, int]]


def spectral_whitening(
    rank: int,
    *,
    power: Number = 0.5,
    residual: Number = 1.0,
    source: str = "gradient",
    side: str | None = None,
    damping: Number = 0.01,
    scale: str | None = "spectral",
    refresh_every: int | None = 1,
    average: float = 0.95,
    num_blocks: int = 2,
    layout: LayoutLike = None,
    sizes: Sizes | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Divides every kernel's update by a power of its spectrum.

    With U the update, a matrix of shape (a, b), and the leading k eigenpairs (V, λ) of
    a covariance C with q eigenvalues:

        O = V(λ + γ)^(−s)VᵀU + κ(τ + γ)^(−s)(U − VVᵀU),   τ = (tr C − Σλ)/(q − k)

    With `source="gradient"` C is that of whatever updates reach it, `UᵀU` or `UUᵀ`,
    q = min(a, b): put it *after* momentum in `optax.chain`, and the result is Muon's
    update with the tail's singular values taken for alike. With `"activation"` C is
    that of the layer's inputs, q its dimension: put it *before* momentum. V is a
    constant to derivatives.

    Args:
      rank: k. Exact where it reaches q. 0 keeps no basis: updates are only scaled.
      power: s. ½ makes the singular values of U alike, 0 leaves them, less than 0
        stretches them. Of activations 1 is the natural gradient's.
      residual: κ in [0, 1], the weight of the complement; 0 drops it.
      source: `"gradient"` or `"activation"` (then `update` takes `activations=`).
      side: Where V lives. None is the smaller side of an update, the output side of a
        convolution's; and the input side for activations.
      damping: γ over the mean eigenvalue, at least 0.
      scale: `"spectral"` gives each matrix of O the norm √q·√max(1, b/a), that of
        Muon; `"rms"` 0.2·√(ab), so that Adam's learning rates fit; `"update"` the norm
        of U; None leaves it.
      refresh_every: Steps between two refreshes of a leaf; the leaves take turns. None
        keeps the first basis.
      average: Of eigenvalues of activations, from refresh to refresh; 0 takes the last.
        Those of updates are always this update's.
      num_blocks: Krylov blocks of a refresh that follows activations.
      layout: Matrix views from `dsbp_jax.layout`, or a function from params (from
        updates, where `update` gets no params) to them; leaves that it does not name
        keep their update. None goes by the shapes.
      sizes: The kernels `(a, b)` of which leaves are coordinates, by path, where the
        transformation runs inside of `spectral_coordinates` or `spectral_training`
        (their `sizes(frame)`, beside `layout=layout(frame)`). Of a kernel's singular
        values coordinates have as many as their smaller side, each as large.
      seed: Of the bases' random start.

    Returns:
      A transformation whose state is a `SpectralState`. `update` also takes
      `refresh=True` or `False` (static) to overrule the schedule.

    Raises:
      ValueError: An argument is out of its range; in `update`, activations are missing
        or do not fit, or the state has another rank.

    References:
      [P] Huang et al., Spectra, arXiv 2602.11185, for s = ½, κ = 1 on updates; Jordan
      et al., Muon, 2024, is its limit of full rank; Benzing, FOOF, 2022, for s = 1 on
      activations. [O] One filter for all of them: METHODS section 8.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_jax
      >>> tx = optax.chain(optax.trace(0.95), dsbp_jax.spectral_whitening(1),
      ...                  optax.scale(-0.1))
      >>> params = {"kernel": jnp.zeros((3, 2))}
      >>> grads = {"kernel": jnp.diag(jnp.array([2.0, 1.0, 0.0]))[:, :2]}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"][0, 0].round(3), updates["kernel"][1, 1].round(3)
      (Array(-0.1, dtype=float32), Array(-0.1, dtype=float32))
    """
    rank = checks.positive_int("rank", rank, minimum=0)
    checks.in_unit_interval("average", average)
    if side is not None:
        checks.one_of("side", side, SIDES)
    if sizes and source != "gradient":
        raise ValueError(
            f"source must be 'gradient' to whiten coordinates, got {source!r}: their "
            "layers' inputs have other dimensions"
        )
    how = SpectralFilter(power, residual, damping, scale)
    of_updates = source == "gradient"
    default = "singular" if of_updates else "input"
    tracker = Tracker(
        rank=max(rank, 1),
        source=source,
        side=default if side is None else side,
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        average=average,
        layout=layout,
        seed=seed,
        cap_rank=not of_updates,
        inert=how.is_identity or rank == 0,
    )
    if how.is_identity or (not of_updates and rank):
        return tracked(
            tracker,
            lambda step: (by_layer(step.updates, step.spaces, how), step.spectral),
        )
    pairs: Sizes = {path: (a, b) for path, (a, b) in (sizes or {}).items()}
    return _of_updates(tracker, how, rank, pairs)


def _of_updates(
    tracker: Tracker, how: SpectralFilter, rank: int, sizes: Sizes
) -> optax.GradientTransformationExtraArgs:
    """The filter of updates by their own spectrum."""

    @keep_shardings
    def update_fn(
        updates: optax.Updates,
        state: SpectralState,
        params: optax.Params | None = None,
        *,
        refresh: bool | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, SpectralState]:
        del extra
        state, groups = follow_updates(
            tracker, state, updates, refresh=refresh, kind=sizes.get
        )
        found: dict[str, tuple[MatrixView, jax.Array]] = {}
        for group in groups:
            results = _whitened(group, how)
            each = zip(group.views, results, strict=True)
            found.update(zip(group.paths, each, strict=True))
        views = tracker.views(updates if params is None else params)
        for path, leaf in array_leaves(updates).items():
            if path in views and path not in found:
                whole = _whitened_exactly if rank else _scaled
                matrix = as_matrices(views[path], leaf)
                found[path] = views[path], whole(matrix, how, sizes.get(path))

        def whiten(path: str, leaf: jax.Array) -> jax.Array:
            if path not in found:
                return leaf
            view, result = found[path]
            matrix = result.reshape(view.matrix_shape(leaf.shape))
            return view.from_matrix(matrix, leaf.shape).astype(leaf.dtype)

        return map_paths(whiten, updates), state

    return optax.GradientTransformationExtraArgs(tracker.init, update_fn)


def _whitened(group: Followed, how: SpectralFilter) -> Sequence[jax.Array]:
    """The filter with few eigenpairs, of updates of one shape; their kind is a `Size`.

    To derivatives the basis is a constant, and all that is computed in it is not.
    """
    side, size, scale = group.side, cast(Size, group.kind), how.scale

    def settings(dials: tuple[jax.Array, ...]) -> SpectralFilter:
        power, residual, damping = dials
        return SpectralFilter(power, residual, damping, scale)

    @jax.custom_jvp
    def apply(
        matrices: tuple[jax.Array, ...],
        dials: tuple[jax.Array, ...],
        known: tuple[Sequence[jax.Array], jax.Array, linalg.Leading],
    ) -> tuple[jax.Array, ...]:
        return _in_basis(matrices, *known, side, settings(dials), size)

    @apply.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple:
        matrices, dials, known = primals
        numbers, _, leading = known
        bases = [unstacked((leading.vectors, leading.rotation), n) for n in numbers]

        def smooth(
            matrices: tuple[jax.Array, ...], dials: tuple[jax.Array, ...]
        ) -> tuple[jax.Array, ...]:
            how = settings(dials)
            return tuple(
                _in_basis_anew(matrix, vectors, rotation, side, how, size)
                for matrix, (vectors, rotation) in zip(matrices, bases, strict=True)
            )

        _, tangent = jax.jvp(smooth, (matrices, dials), tangents[:2])
        return apply(*primals), tangent

    dials = tuple(
        jnp.asarray(dial, group.traces.dtype)
        for dial in (how.power, how.residual, how.damping)
    )
    return apply(group.matrices, dials, (group.numbers, group.traces, group.leading))


def _in_basis(
    matrices: Sequence[jax.Array],
    numbers: Sequence[jax.Array],
    traces: jax.Array,
    leading: linalg.Leading,
    side: str,
    how: SpectralFilter,
    size: Size,
) -> tuple[jax.Array, ...]:
    """The filter by what the refresh has computed already."""
    *_, a, b = matrices[0].shape
    rest = 1 - jnp.sum(leading.values, axis=-1)
    factors = how.factors(leading.values, rest, min(a, b))
    strength = how.strength(factors, leading.values, traces, traces, (a, b), size)
    # Relative to the tail, which the update itself has.
    tails = strength * factors.tail
    head = strength[..., None] * factors.head - tails[..., None]
    head = head * jnp.sqrt(traces)[..., None]
    with jax.default_matmul_precision("highest"):
        turned = (leading.rotation * head[..., None, :]) @ leading.rotation.mT
        stacks = tails, leading.thin, turned, leading.vectors
        results = []
        for matrix, number in zip(matrices, numbers, strict=True):
            tail, thin, turn, vectors = unstacked(stacks, number)
            # Behind the barrier it is computed once, and not for each entry.
            tail = jax.lax.optimization_barrier(tail)[..., None, None]
            inside = linalg.expand(thin @ turn, vectors, side)
            results.append(tail * matrix + inside)
    return tuple(results)


def _in_basis_anew(
    matrix: jax.Array,
    vectors: jax.Array,
    rotation: jax.Array,
    side: str,
    how: SpectralFilter,
    size: Size,
) -> jax.Array:
    """The same from the matrix alone, with the derivatives of a matrix function."""
    *_, a, b = matrix.shape
    trace, unit = _unit(matrix)
    with jax.default_matmul_precision("highest"):
        thin = linalg.times(unit, vectors, side) @ rotation
        gram = thin.mT @ thin
        values = jnp.diagonal(gram, axis1=-2, axis2=-1)
        rest = 1 - jnp.sum(values, axis=-1)
        factors, function = nearly_diagonal(gram, rest, how, min(a, b))
        strength = how.strength(factors, values, trace, trace, (a, b), size)
        turned = function - factors.tail[..., None, None] * jnp.eye(
            gram.shape[-1], dtype=gram.dtype
        )
        inside = linalg.expand(thin @ turned, vectors @ rotation, side)
        norm = jnp.sqrt(jnp.where(trace > 0, trace, 1))
        whole = factors.tail[..., None, None] * unit + inside
        return (strength * norm)[..., None, None] * whole


def _unit(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The squared norms of matrices, and them over their norms."""
    trace = squared_norm(matrix)
    norm = jnp.sqrt(jnp.where(trace > 0, trace, 1))
    return trace, matrix / norm[..., None, None]


def _whitened_exactly(matrix: jax.Array, how: SpectralFilter, size: Size) -> jax.Array:
    """The filter with all eigenpairs."""
    *_, a, b = matrix.shape
    trace, unit = _unit(matrix)
    with jax.default_matmul_precision("highest"):
        values, factors, function = whole_space(
            unit if a >= b else unit.mT, how, min(a, b)
        )
        strength = how.strength(factors, values, trace, trace, (a, b), size)
        function = function * strength[..., None, None]
        return matrix @ function if a >= b else function @ matrix


def _scaled(matrix: jax.Array, how: SpectralFilter, size: Size) -> jax.Array:
    """The filter without any eigenpair."""
    *_, a, b = matrix.shape
    trace = squared_norm(matrix)
    none = jnp.zeros((*trace.shape, 0), trace.dtype)
    factors = how.factors(none, jnp.ones_like(trace), min(a, b))
    strength = how.strength(factors, none, trace, trace, (a, b), size)
    return (
        jax.lax.optimization_barrier(strength * factors.tail)[..., None, None] * matrix
    )


def by_layer(
    updates: optax.Updates,
    spaces: Mapping[str, tuple[Eigenspace, ...]],
    how: SpectralFilter,
) -> optax.Updates:
    """Updates, each divided by the spectrum of what its layer saw.

    Args:
      updates: A tree of them; leaves that `spaces` does not name stay as they are.
      spaces: Path to the one eigenspace of a leaf.
      how: The filter.

    Returns:
      The filtered updates.
    """

    def whiten(path: str, leaf: jax.Array) -> jax.Array:
        if path not in spaces:
            return leaf
        (space,) = spaces[path]
        assert space.view is not None
        *_, window, d_in, d_out = space.view.matrix_shape(leaf.shape)
        shape = window * d_in, d_out

        def weigh(energies: jax.Array, total: jax.Array) -> Factors:
            dtype = energies.dtype
            values, trace = space.values.astype(dtype), space.trace.astype(dtype)
            known = space.solved & (trace > 0)
            unit = jnp.where(known, trace, 1)
            shares = jnp.maximum(values, 0) / unit[..., None]
            rest = 1 - jnp.sum(shares, axis=-1)
            found = how.factors(shares, rest, space.vectors.shape[-2])
            # A layer that nothing is known of is as if all its eigenvalues were one.
            head = jnp.where(known[..., None], found.head, 1)
            tail = jnp.where(known, found.tail, 1)
            inside = energies / jnp.where(total > 0, total, 1)[..., None]
            strength = how.strength(Factors(head, tail), inside, total, unit, shape)
            return Factors(head * strength[..., None], tail * strength)

        return space.filter(leaf, weigh)

    return map_paths(whiten, updates)
