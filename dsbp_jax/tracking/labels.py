"""What users pass as bases, labelled: of each leaf the eigenspaces that fit a need.

A labelled eigenspace is taken at its word. An `EigenBasis` has no label: its side is
the argument's, or that whose dimension it has; where both have it, it is refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from dsbp_jax import checks
from dsbp_jax.layers import MatrixView, require_paths
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.eigenspace import SIDES, Eigenspace
from dsbp_jax.tracking.leaves import LayoutLike, array_leaves, matrix_views

#: Eigenspaces by canonical path, as every consumer of bases takes them.
Spaces = Mapping[str, EigenBasis | Eigenspace | Sequence[Eigenspace]]


def labelled(
    name: str,
    given: Spaces,
    params: optax.Params,
    layout: LayoutLike = None,
    *,
    side: str | None = None,
    need: str | None = None,
    rank: int = 1,
) -> dict[str, tuple[Eigenspace, ...]]:
    """What was passed as bases, as eigenspaces of the leaves of the params.

    Args:
      name: What they were passed as, for the messages.
      given: Path to `Eigenspace`, to a tuple of them as `dsbp_jax.eigenspaces` gives
        them, or to `EigenBasis`. Paths that are no leaf are ignored, as under a mask.
      params: The params, or updates of their shape.
      layout: The views of leaves whose bases have no label; checked against the others.
      side: What the user says of it: `"input"`, `"output"`, `"both"`, or None for
        whatever there is.
      need: The only side that is of use, whatever the user says; None for any.
      rank: The columns that each must have at least.

    Returns:
      Path to one space, or with `side="both"` up to two.

    Raises:
      ValueError: None belongs to a leaf, a basis has another shape or no telling
        side, or two spaces of a leaf fit.

    Example:
      >>> import jax.numpy as jnp
      >>> basis = EigenBasis(jnp.eye(3, 1), jnp.ones(1), jnp.ones(()))
      >>> labelled("bases", {"w": basis}, {"w": jnp.ones((4, 3))})["w"][0].side
      'output'
      >>> labelled("bases", {"w": basis}, {"w": jnp.ones((3, 3))})
      Traceback (most recent call last):
      ...
      ValueError: bases of 'w' must say which side they are of, as ...
    """
    require_some(name, given)
    if side is not None:
        checks.one_of("side", side, (*SIDES, "both"))
    leaves, views = array_leaves(params), matrix_views(params, layout)
    if leaves and not any(path in views for path in given):
        require_paths(list(given)[:1], views, "the layout of the params")
    result: dict[str, tuple[Eigenspace, ...]] = {}
    seen: set[str] = set()
    for path, view in views.items():
        if path not in given:
            continue
        spaces = _spaces(name, path, given[path], view, leaves[path].shape, side)
        seen.update(space.side for space in spaces)
        fitting = [
            one
            for one in spaces
            if side in (None, "both", one.side) and need in (None, one.side)
        ]
        for one in fitting:
            if layout is not None and one.view not in (None, view):
                raise ValueError(
                    f"{name} of {path!r} must be of the leaf as layout sees it, "
                    f"{view}, got those of {one.view}"
                )
            _check_fit(name, path, one, view, leaves[path].shape, rank)
        sides = {one.side for one in fitting}
        if len(fitting) > (len(sides) if side == "both" else 1):
            raise ValueError(
                f"{name} must hold one eigenspace of {path!r} that fits, got "
                f"{' and '.join(map(_describe, fitting))}; name the side, or pass the "
                "one that is meant"
            )
        if fitting:
            result[path] = tuple(_seen_as(one, one.view or view) for one in fitting)
    if leaves and not result:
        raise ValueError(
            f"{name} must hold bases of the {need or side} side, got those of the "
            f"{' and the '.join(sorted(seen)) or 'none'} side"
        )
    return result


def require_some(name: str, bases: Any) -> None:
    """Raises where there is no basis at all, as of a side that nothing tracks.

    Example:
      >>> require_some("source_bases", {})
      Traceback (most recent call last):
      ...
      ValueError: source_bases must hold the basis of at least one leaf, got none
    """
    if not bases:
        raise ValueError(f"{name} must hold the basis of at least one leaf, got none")


def _seen_as(space: Eigenspace, view: MatrixView) -> Eigenspace:
    return dataclasses.replace(space, view=view)


def _describe(space: Eigenspace) -> str:
    return f"rank {space.rank} on the {space.side} side (source {space.source!r})"


def _spaces(
    name: str,
    path: str,
    entry: EigenBasis | Eigenspace | Sequence[Eigenspace],
    view: MatrixView,
    shape: tuple[int, ...],
    side: str | None,
) -> tuple[Eigenspace, ...]:
    """The spaces of one leaf; a basis without a label with the one it can only have."""
    if isinstance(entry, Eigenspace):
        return (entry,)
    if not isinstance(entry, EigenBasis):
        if isinstance(entry, tuple | list) and all(
            isinstance(one, Eigenspace) for one in entry
        ):
            return tuple(entry)
        raise ValueError(
            f"{name} of {path!r} must be an Eigenspace, a tuple of them or an "
            f"EigenBasis, got {type(entry).__name__}"
        )
    dims = dict(zip(SIDES, view.matrix_shape(shape)[-2:], strict=True))
    dim = entry.vectors.shape[-2]
    fitting = [one for one, size in dims.items() if size == dim]
    if side in SIDES:
        fitting = [one for one in SIDES if one == side]
    if len(fitting) > 1:
        raise ValueError(
            f"{name} of {path!r} must say which side they are of, as "
            "dsbp_jax.eigenspaces(opt_state) does, or by side=: the kernel is square "
            f"({dim} by {dim}), got a plain EigenBasis"
        )
    # Of neither dimension: the check of the shape says so.
    found = fitting[0] if fitting else "output"
    return (Eigenspace(entry, entry.trace > 0, None, found, "given"),)


def _check_fit(
    name: str,
    path: str,
    space: Eigenspace,
    view: MatrixView,
    shape: tuple[int, ...],
    rank: int,
) -> None:
    view = space.view or view
    matrix = view.matrix_shape(shape)
    expected = (*matrix[:-3], matrix[-2 + SIDES.index(space.side)])
    actual = space.vectors.shape
    if actual[:-1] != expected or actual[-1] < rank:
        raise ValueError(
            f"{name} of {path!r} must have vectors of shape "
            f"({', '.join(map(str, expected))}, k) with k of at least {rank}, got "
            f"{actual}"
        )
