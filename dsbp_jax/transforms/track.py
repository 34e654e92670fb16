"""Bases for other uses: tracked beside any optimizer, put into another's state."""

from collections.abc import Mapping, Sequence

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
    entries: dict[tuple[str, str], list[TrackedBasis]] = {}
    for state in spectral_states(opt_state):
        for key, entry in state.entries().items():
            entries.setdefault(key, []).append(entry)
    given = {
        (name, path): space
        for name, path in entries
        if (space := _given(path, bases.get(path), name, entries, side)) is not None
    }
    for key, space in given.items():
        _check_fit(key[1], space, entries[key])

    def place(name: str, path: str, entry: TrackedBasis) -> TrackedBasis:
        space, rank = given.get((name, path)), entry.basis.vectors.shape[-1]
        if space is None or space.rank < rank:
            return entry
        basis = (jnp.array(x, jnp.float32) for x in space.leading(rank).basis)
        # A random start stays one.
        refreshes = space.solved.astype(jnp.int32) * jnp.maximum(entry.refreshes, 1)
        return entry._replace(basis=EigenBasis(*basis), refreshes=refreshes)

    def fill(state: SpectralState) -> SpectralState:
        filled: dict[str, dict[str, TrackedBasis]] = {}
        for (name, path), entry in state.entries().items():
            filled.setdefault(name, {})[path] = place(name, path, entry)
        return state._replace(tracked={name: {} for name in state.tracked} | filled)

    if not given:
        where = "" if side is None else f" on the {side} side"
        known = {path for name, path in entries if side in (None, name)}
        raise ValueError(
            f"bases must name a leaf that the optimizer tracks{where} "
            f"({', '.join(sorted(known)) or 'none'}), got those of "
            f"{', '.join(sorted(bases)) or 'none'}"
        )
    return map_spectral_states(fill, opt_state)


def _given(
    path: str,
    entry: EigenBasis | Eigenspace | Sequence[Eigenspace] | None,
    name: str,
    entries: Mapping[tuple[str, str], Sequence[TrackedBasis]],
    side: str | None,
) -> Eigenspace | None:
    """The eigenspace that was given for one side of a leaf, the first of several."""
    if entry is None or side not in (None, name):
        return None
    if not isinstance(entry, EigenBasis):
        spaces = (entry,) if isinstance(entry, Eigenspace) else entry
        return next((space for space in spaces if space.side == name), None)
    label = entries[name, path][0].label
    both = all((one, path) in entries for one in SIDES)
    square = label is not None and len(set(label.dims.values())) == 1
    if side is None and (both or square):
        which = "both sides are tracked" if both else "the kernel is square"
        raise ValueError(
            f"side must be 'input' or 'output' where {which}, as of {path!r}, got "
            "None; bases from dsbp_jax.eigenspaces(opt_state) say theirs"
        )
    return Eigenspace(entry, entry.trace > 0, None, name, "given")


def _check_fit(path: str, space: Eigenspace, entries: Sequence[TrackedBasis]) -> None:
    """Raises unless a space is as some transform tracks it."""
    shapes = [entry.basis.vectors.shape for entry in entries]
    if space.vectors.shape not in shapes:
        raise ValueError(
            f"bases of {path!r} must have vectors of shape "
            f"{' or '.join(map(str, shapes))}, as the optimizer tracks them, got "
            f"{space.vectors.shape}"
        )
    label = entries[0].label
    if label is not None and space.view not in (None, label.view):
        raise ValueError(
            f"bases of {path!r} must be of the leaf as the optimizer sees it, "
            f"{label.view}, got those of {space.view}"
        )
