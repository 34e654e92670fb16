"""Bases for other uses: tracked beside any optimizer, put into another's state."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking import (
    SIDES,
    Eigenspace,
    LayoutLike,
    Spaces,
    SpectralState,
    TrackedBasis,
    Tracker,
    as_spaces,
    describe,
    map_spectral_states,
    spectral_states,
    tracked,
)


def track_bases(
    rank: int,
    *,
    source: str = "gradient",
    side: str = "output",
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: LayoutLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an eigenbasis of every layer fresh and leaves the updates as they are.

    Chained before any optimizer, `dsbp_jax.eigenspaces(opt_state)` and
    `dsbp_jax.diagnostics(opt_state)` then read what it tracks: to watch a network,
    or to hand the eigenspaces to another use (`with_bases`, `dsbp_jax.meta.maml`).

    Args:
      rank: Columns k of each eigenbasis. A layer of dimension up to k is not tracked.
      source: As in `spectral_projection`: `"gradient"`, or `"activation"`, for which
        `update` takes `activations=`.
      side: `"input"`, `"output"` or `"both"`.
      refresh_every: Steps between two refreshes of a leaf; the leaves take turns.
      num_blocks: Krylov blocks of a refresh, at least 2.
      tolerance: While a basis is invariant to this relative residual, in [0, 1], only
        rotate it inside its span.
      layout: As in `spectral_projection`.
      seed: Of the bases' random start.

    Returns:
      A transformation whose state is a `SpectralState`. `update` also takes
      `refresh=True` or `False` (static) to overrule the schedule.

    Raises:
      ValueError: An argument is out of its range; in `update`, activations are
        missing or do not fit.

    Example:
      >>> import dsbp_jax
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> tx = dsbp_jax.track_bases(rank=1)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["kernel"] is params["kernel"]
      True
      >>> dsbp_jax.bases(state)["kernel"].values.tolist()
      [9.0]
    """
    checks.one_of("side", side, (*SIDES, "both"))
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
    return tracked(tracker, lambda step: (step.updates, step.spectral))


def with_bases(
    opt_state: optax.OptState, bases: Spaces, *, side: str | None = None
) -> optax.OptState:
    """An optimizer state that holds given bases: the inverse of `eigenspaces`.

    Pass `refresh=False` to `update` to keep them as they are. Leaves that `bases`
    does not name keep what they have. Where several transforms of a chain track a leaf,
    those that hold fewer columns take the leading ones.

    Args:
      opt_state: The state of any optimizer that contains a spectral transform, as its
        `init` returns it (not wrapped in the variables of Flax nnx).
      bases: From canonical path to eigenspaces, as `dsbp_jax.eigenspaces` gives them,
        or to an `EigenBasis`; paths that the state does not track are ignored.
      side: `"input"` or `"output"`, the side that bases without a label are of; may be
        None where no leaf is tracked on both and the kernel is not square.

    Returns:
      A state of the same structure, which shares no array with `bases`.

    Raises:
      ValueError: The state tracks none of the paths, a basis has another shape, or
        it is not known which side it is of.

    Example:
      >>> import dsbp_jax
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> tx = dsbp_jax.spectral_projection(rank=1)
      >>> _, trained = tx.update(params, tx.init(params))
      >>> fresh = with_bases(tx.init(params), dsbp_jax.eigenspaces(trained))
      >>> updates, _ = tx.update(params, fresh, refresh=False)
      >>> updates["kernel"].tolist()
      [[3.0, 0.0], [0.0, 0.0]]
    """
    if side is not None:
        checks.one_of("side", side, SIDES)
    states = spectral_states(opt_state)
    tracked_sides: dict[str, set[str]] = {}
    for state in states:
        for name, path in state.entries():
            if side in (None, name):
                tracked_sides.setdefault(path, set()).add(name)
    if not set(tracked_sides) & set(bases):
        where = "" if side is None else f" on the {side} side"
        raise ValueError(
            f"bases must name a leaf that the optimizer tracks{where} "
            f"({', '.join(sorted(tracked_sides)) or 'none'}), got those of "
            f"{', '.join(sorted(bases)) or 'none'}"
        )

    def place(entry: TrackedBasis, spaces: Sequence[Eigenspace]) -> TrackedBasis:
        space, rank = _of_entry(entry, spaces), entry.vectors.shape[-1]
        if space is None:
            return entry
        basis = (jnp.array(x, jnp.float32) for x in space.leading(rank).basis)
        # A random start stays one.
        refreshes = space.solved.astype(jnp.int32) * jnp.maximum(entry.refreshes, 1)
        return entry._replace(basis=EigenBasis(*basis), refreshes=refreshes)

    given = {
        path: _spaces_of_leaf(path, bases[path], states, sides, side)
        for path, sides in tracked_sides.items()
        if path in bases
    }

    def fill(state: SpectralState) -> SpectralState:
        filled: dict[str, dict[str, TrackedBasis]] = {}
        for (name, path), entry in state.entries().items():
            wanted = side in (None, name) and path in given
            new = place(entry, given[path]) if wanted else entry
            filled.setdefault(name, {})[path] = new
        return state._replace(tracked=filled)

    return map_spectral_states(fill, opt_state)


def _spaces_of_leaf(
    path: str,
    entry: EigenBasis | Eigenspace | Sequence[Eigenspace],
    states: Sequence[SpectralState],
    sides: set[str],
    side: str | None,
) -> tuple[Eigenspace, ...]:
    """What was given for a leaf, checked against all that tracks it."""
    held = [
        one
        for state in states
        for (name, of), one in state.entries().items()
        if of == path and name in sides
    ]
    label = held[0].label
    assert label is not None
    if isinstance(entry, EigenBasis):
        square = len(set(label.dims.values())) == 1
        if side is None and (len(sides) > 1 or square):
            which = (
                "both sides are tracked" if len(sides) > 1 else "the kernel is square"
            )
            raise ValueError(
                f"side must be 'input' or 'output' where {which}, as of {path!r}, got "
                "None; bases from dsbp_jax.eigenspaces(opt_state) say theirs"
            )
    what = f"bases of {path!r}"
    only = next(iter(sides)) if len(sides) == 1 else None
    spaces = as_spaces(what, entry, label.dims, only, named=True)
    missing = sides - {space.side for space in spaces}
    if missing:
        raise ValueError(
            f"{what} must be of the {' and the '.join(sorted(sides))} side, which the "
            f"optimizer tracks, got {' and '.join(map(describe, spaces))}"
        )
    shapes = [one.vectors.shape for one in held]
    for space in spaces:
        if space.side in sides and space.vectors.shape not in shapes:
            raise ValueError(
                f"{what} must have vectors of shape {' or '.join(map(str, shapes))}, "
                f"as the optimizer tracks them, got {space.vectors.shape}"
            )
        views = {one.label.view for one in held if one.label is not None}
        if space.view is not None and space.view not in views:
            raise ValueError(
                f"{what} must be of the leaf as the optimizer sees it, "
                f"{' or '.join(map(str, views))}, got those of {space.view}"
            )
    return spaces


def _of_entry(entry: TrackedBasis, spaces: Sequence[Eigenspace]) -> Eigenspace | None:
    """The space that a tracker takes: of its own source and rank, if there is one."""
    label, rank = entry.label, entry.vectors.shape[-1]
    assert label is not None
    fitting = [
        space
        for space in spaces
        if space.side == label.side
        and space.view in (None, label.view)
        and space.rank >= rank
    ]
    preference = lambda space: (space.source != label.source, space.rank != rank)
    return min(fitting, key=preference, default=None)
