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

_GIVEN = "given"  # the source of a basis that came without a label


def labelled(
    name: str,
    given: Spaces,
    params: optax.Params,
    layout: LayoutLike = None,
    *,
    side: str | None = None,
    need: str | None = None,
    rank: int = 1,
    required: bool = True,
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
      required: Whether one of them must be of a leaf that is here.

    Returns:
      Path to one space, or with `side="both"` up to two.

    Raises:
      ValueError: None belongs to a leaf, a basis has another shape or side or no
        telling one, or two spaces of a leaf fit.

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
    if required and leaves and not any(path in views for path in given):
        require_paths(list(given)[:1], views, "params")
    wanted = need or (side if side in SIDES else None)
    result = {}
    for path, view in views.items():
        if path not in given:
            continue
        shape = leaves[path].shape
        dims = dict(zip(SIDES, view.matrix_shape(shape)[-2:], strict=True))
        what = f"{name} of {path!r}"
        spaces = as_spaces(what, given[path], dims, wanted, named=side in SIDES)
        fitting = [one for one in spaces if wanted in (None, one.side)]
        for one in fitting:
            unknown = one.view is None and one.source != _GIVEN
            if unknown and layout is None and len(set(dims.values())) == 1:
                raise ValueError(
                    f"{what} must say how the leaf is a matrix, since it is square "
                    f"{shape}; pass layout=dsbp_jax.layout(fn, params, *args)"
                )
            if layout is not None and one.view not in (None, view):
                raise ValueError(
                    f"{what} must be of the leaf as layout sees it, {view}, got those "
                    f"of {one.view}"
                )
            check_shape(what, one, one.view or view, shape, rank)
        sides = {one.side for one in fitting}
        if not fitting:
            raise ValueError(
                f"{what} must be of the {wanted} side, got those of the "
                f"{' and the '.join(sorted({one.side for one in spaces}))} side"
            )
        if len(fitting) > (len(sides) if side == "both" else 1):
            raise ValueError(
                f"{name} must hold one eigenspace of {path!r} that fits, got "
                f"{' and '.join(map(describe, fitting))}; name the side, or pass the "
                "one that is meant"
            )
        result[path] = tuple(
            dataclasses.replace(one, view=one.view or view) for one in fitting
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


def describe(space: Eigenspace) -> str:
    """A space in a few words, for messages."""
    return f"rank {space.rank} on the {space.side} side (source {space.source!r})"


def as_spaces(
    what: str,
    entry: EigenBasis | Eigenspace | Sequence[Eigenspace],
    dims: Mapping[str, int],
    side: str | None,
    *,
    named: bool,
) -> tuple[Eigenspace, ...]:
    """What was passed for one leaf, labelled.

    Args:
      what: What it is, for the messages.
      entry: The entry; an `EigenBasis` gets the label that it can only have.
      dims: The dimensions of the leaf's sides.
      side: The only side that is of use, or None.
      named: Whether the user named it.

    Returns:
      The eigenspaces.

    Raises:
      ValueError: It is none, or it may be of either side.
    """
    if isinstance(entry, Eigenspace):
        return (entry,)
    if isinstance(entry, EigenBasis):
        dim = entry.vectors.shape[-2]
        fitting = [one for one, size in dims.items() if size == dim]
        if len(fitting) > 1 and not named:
            raise ValueError(
                f"{what} must say which side they are of, as "
                "dsbp_jax.eigenspaces(opt_state) does: the kernel is square "
                f"({dim} by {dim}), got a plain EigenBasis"
            )
        # Of neither dimension: the check of the shape says so.
        found = side or (fitting or ["output"])[0]
        return (Eigenspace(entry, entry.trace > 0, None, found, _GIVEN),)
    if isinstance(entry, tuple | list) and all(
        isinstance(one, Eigenspace) for one in entry
    ):
        return tuple(entry)
    raise ValueError(
        f"{what} must be an Eigenspace, a tuple of them or an EigenBasis, got "
        f"{type(entry).__name__}"
    )


def check_shape(
    what: str, space: Eigenspace, view: MatrixView, shape: tuple[int, ...], rank: int
) -> None:
    """Raises unless a space has the dimensions of one side of a leaf."""
    actual = space.vectors.shape
    expected: tuple[int, ...] | None = None
    if len(shape) > max(*view.batch_axes, *view.input_axes, *view.output_axes):
        matrix = view.matrix_shape(shape)
        expected = (*matrix[:-3], matrix[-2 + SIDES.index(space.side)])
    if expected is None:
        raise ValueError(
            f"{what} must be of a leaf of shape {shape}, got those of one seen as "
            f"{view}"
        )
    if actual[:-1] != expected or actual[-1] < rank:
        raise ValueError(
            f"{what} must have vectors of shape ({', '.join(map(str, expected))}, k) "
            f"with k of at least {rank}, got {actual}"
        )
