"""Bases for other uses: tracked beside any optimizer, put into another's state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import Layout
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import (
    SIDES,
    SpectralState,
    TrackedBasis,
    Tracker,
    tracked_by_side,
)


def track_bases(
    rank: int,
    *,
    source: str = "gradient",
    side: str = "output",
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: Layout | Callable[[Any], Layout] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an eigenbasis of every layer fresh and leaves the updates as they are.

    Chained before any optimizer, `dsbp_jax.bases(opt_state)` and
    `dsbp_jax.diagnostics(opt_state)` then read what it tracks: to watch a network,
    or to hand the bases to another use (`with_bases`, `dsbp_jax.meta.maml`).

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

    @keep_shardings
    def update_fn(
        updates: Any,
        state: SpectralState,
        params: Any = None,
        *,
        activations: Any = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SpectralState]:
        del extra_args
        views = tracker.views(updates if params is None else params)
        state = tracker.update(
            state, updates, views, activations=activations, refresh=refresh
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(tracker.init, update_fn)


def with_bases(
    opt_state: Any, bases: Mapping[str, EigenBasis], *, side: str | None = None
) -> Any:
    """An optimizer state that holds given bases: the inverse of `dsbp_jax.bases`.

    Pass `refresh=False` to `update` to keep them as they are. Leaves that `bases`
    does not name keep what they have.

    Args:
      opt_state: The state of any optimizer that contains a spectral transform, as its
        `init` returns it (not wrapped in the variables of Flax nnx).
      bases: From canonical path to basis, in the shapes of the state's own; paths that
        the state does not track are ignored.
      side: `"input"` or `"output"`, the side that the bases are of; may be None where
        no leaf has both.

    Returns:
      A state of the same structure.

    Raises:
      ValueError: The state tracks none of the paths, a basis has another shape, or
        both sides of a leaf are tracked and `side` is None.

    Example:
      >>> import dsbp_jax
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> tx = dsbp_jax.spectral_projection(rank=1)
      >>> _, trained = tx.update(params, tx.init(params))
      >>> fresh = with_bases(tx.init(params), dsbp_jax.bases(trained))
      >>> updates, _ = tx.update(params, fresh, refresh=False)
      >>> updates["kernel"].tolist()
      [[3.0, 0.0], [0.0, 0.0]]
    """
    if side is not None:
        checks.one_of("side", side, SIDES)
    sides = [set(entries) for entries in (tracked_by_side(opt_state) or {}).values()]
    shared = set.intersection(*sides) & set(bases) if len(sides) > 1 else set()
    if shared and side is None:
        raise ValueError(
            "side must be 'input' or 'output' where both sides are tracked, as of "
            f"{min(shared)!r}, got None"
        )
    is_state = lambda node: isinstance(node, SpectralState)
    placed: set[str] = set()
    known: set[str] = set()

    def place(name: str, path: str, entry: TrackedBasis) -> TrackedBasis:
        if side not in (None, name):
            return entry
        known.add(path)
        if path not in bases:
            return entry
        given = bases[path]
        expected, actual = entry.basis.vectors.shape, given.vectors.shape
        if actual != expected:
            raise ValueError(
                f"bases of {path!r} must have vectors of shape {expected}, as the "
                f"optimizer tracks them, got {actual}"
            )
        placed.add(path)
        basis = EigenBasis(*(jnp.asarray(x, jnp.float32) for x in given))
        # Without a trace it was not solved yet: a random start stays one.
        solved = (basis.trace > 0).astype(jnp.int32)
        refreshes = solved * jnp.maximum(entry.refreshes, 1)
        return entry._replace(basis=basis, refreshes=refreshes)

    def fill(node: Any) -> Any:
        if not is_state(node):
            return node
        tracked = {
            name: {path: place(name, path, entry) for path, entry in entries.items()}
            for name, entries in node.tracked.items()
        }
        return node._replace(tracked=tracked)

    result = jax.tree.map(fill, opt_state, is_leaf=is_state)
    if not placed:
        where = "" if side is None else f" on the {side} side"
        raise ValueError(
            f"bases must name a leaf that the optimizer tracks{where} "
            f"({', '.join(sorted(known)) or 'none'}), got those of "
            f"{', '.join(sorted(bases)) or 'none'}"
        )
    return result
