"""What coordinates stand on: kernels `W₀`, their columns V, and how both change.

The fold of one leaf is written here only: S goes into W₀, V follows what was seen of
the layer, and what rounding would lose stays in S. The sum itself is `kernels`'.
"""

import dataclasses
import zlib
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.backprop.columns import Columns, ColumnsState, vectors
from dsbp_jax.backprop.kernels import kernel_sum, rounded
from dsbp_jax.backprop.seen import Seen
from dsbp_jax.layers import (
    Layout,
    MatrixView,
    is_traced,
    leaves_by_path,
    map_paths,
    require_paths,
)
from dsbp_jax.ownership import own
from dsbp_jax.tracking import (
    SpectralState,
    TrackedBasis,
    rotation,
    take_turns,
    wide,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """What the coordinates stand on; changes at a fold only.

    Attributes:
      kernels: Canonical path to `W₀`, in the shape and dtype of the parameter.
      columns: The columns V of every such leaf.
      folds: Folds so far, from which the rounding of narrow kernels draws.  # int32
      layout: The matrix view of every such leaf; static.
    """

    kernels: dict[str, jax.Array]
    columns: ColumnsState
    folds: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})


def split(params: Any, columns: ColumnsState, layout: Layout) -> tuple[Any, Frame]:
    """Coordinates at zero, and the frame that makes them `params`."""
    bases = jax.eval_shape(vectors, *columns)
    leaves = leaves_by_path(params)
    kernels = {path: leaves[path] for path in layout}

    def coordinate(path: str, leaf: Any) -> Any:
        if path not in kernels:
            return leaf
        *batch, taps, _, d_out = layout[path].matrix_shape(leaf.shape)
        window = (taps,) if taps > 1 else ()
        shape = (*batch, *window, bases[path].shape[-1], d_out)
        return jnp.zeros(shape, wide(leaf.dtype))

    frame = Frame(kernels, columns, jnp.int32(0), layout)
    return map_paths(coordinate, params), frame


def merge(coords: Any, frame: Frame) -> Any:
    """The parameters that coordinates stand for, `W₀ + VS` where a leaf is held so.

    Args:
      coords: The coordinates.
      frame: Their frame.

    Returns:
      A tree of the same structure, in the shapes and dtypes of the parameters. It
      shares no buffer with `coords`, which may be donated.
    """
    whole = lambda path, leaf: leaf if path in frame.kernels else own(leaf)
    return map_paths(whole, merged(coords, frame))


def merged(
    coords: Any,
    frame: Frame,
    kernels: Mapping[str, jax.Array] | None = None,
    alone: Container[str] = (),
) -> Any:
    """`merge`, with the whole leaves as they are.

    Args:
      coords: The coordinates.
      frame: Their frame.
      kernels: `W₀` in place of the frame's.
      alone: Paths of which `W₀` is wanted, and not the sum.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: The coordinates lack a leaf of the frame.
    """
    require_paths(frame.kernels, leaves_by_path(coords), "coords")
    kernels = frame.kernels if kernels is None else kernels
    bases = vectors(*frame.columns)

    def whole(path: str, leaf: jax.Array) -> jax.Array:
        if path not in kernels or path in alone:
            return kernels.get(path, leaf)
        return kernel_sum(kernels[path], leaf, bases[path], frame.layout[path])

    return map_paths(whole, coords)


def views(frame: Frame) -> Layout:
    """How the coordinates of each held leaf are matrices.

    Args:
      frame: The frame.

    Returns:
      The view of S, `(*batch, [window,] k, d_out)`, by path.
    """
    bases, found = jax.eval_shape(vectors, *frame.columns), {}
    for path, view in frame.layout.items():
        *batch, window, _, _ = view.matrix_shape(frame.kernels[path].shape)
        first = len(batch) + (window > 1)
        assert bases[path].ndim == len(batch) + 2
        found[path] = MatrixView((first,), (first + 1,), tuple(range(len(batch))))
    return Layout(found)


def sizes(frame: Frame) -> dict[str, tuple[int, int]]:
    """The kernels behind the coordinates as matrices.

    Args:
      frame: The frame.

    Returns:
      `(window·d_in, d_out)` by path.
    """
    found = {}
    for path, view in frame.layout.items():
        *_, window, d_in, d_out = view.matrix_shape(frame.kernels[path].shape)
        found[path] = window * d_in, d_out
    return found


def groups(frame: Frame, most: int) -> list[list[str]]:
    """The leaves that are folded together, at most so many groups, alike in cost."""
    costs = {path: kernel.size for path, kernel in frame.kernels.items()}
    turns = take_turns(costs, max(1, min(most, len(costs))))
    found: list[list[str]] = [[] for _ in range(max(turns.values(), default=0) + 1)]
    for path, turn in turns.items():
        found[turn].append(path)
    return found


Entries = tuple[TrackedBasis | None, TrackedBasis | None]


class Leaf(NamedTuple):
    """One leaf that is held in coordinates.

    Attributes:
      kernel: `W₀`.
      coordinate: S.
      entries: Its columns of either source, None where it has none.
    """

    kernel: jax.Array
    coordinate: jax.Array
    entries: Entries


def leaf_of(coordinate: jax.Array, frame: Frame, path: str) -> Leaf:
    """A leaf of coordinates and frame."""
    found = [state.tracked.get("input", {}).get(path) for state in frame.columns]
    return Leaf(frame.kernels[path], coordinate, (found[0], found[1]))


def follow(
    entries: Mapping[str, Entries], seen: Mapping[str, Seen], columns: Columns
) -> dict[str, Entries]:
    """The columns of some leaves, refreshed from what was seen of them.

    A program of one leaf serves all of its shape. Inside of another program it would
    be compiled leaf by leaf: there they go together, as leaves of a shape then share a
    solve.

    Args:
      entries: The columns, by path.
      seen: What was seen of these leaves and maybe others, by path.
      columns: How they are refreshed.

    Returns:
      The new columns, by path.
    """
    if is_traced((entries, seen)):
        return _follow(entries, seen, columns=columns)
    return {
        path: _follow_alone({"": found}, {"": seen[path]}, columns=columns)[""]
        for path, found in entries.items()
    }


def _follow(
    entries: Mapping[str, Entries], seen: Mapping[str, Seen], *, columns: Columns
) -> dict[str, Entries]:
    states = columns.follow(_states(entries), {path: seen[path] for path in entries})
    activation, gradient = (state.tracked.get("input", {}) for state in states)
    return {path: (activation.get(path), gradient.get(path)) for path in entries}


_follow_alone = jax.jit(_follow, static_argnames="columns")


def _fold(
    kernel: jax.Array,
    coordinate: jax.Array,
    known: Entries,
    entries: Entries,
    shrink: jax.Array | None,
    draw: tuple[jax.Array, jax.Array],
    offset: jax.Array,
    *,
    view: MatrixView,
) -> tuple[Leaf, jax.Array]:
    """S folded into `W₀`.

    Args:
      kernel: `W₀`.
      coordinate: S.
      known: The columns that it is in.
      entries: The columns to come.
      shrink: A factor of the folded kernel, shape `()`, or None.
      draw: Numbers of the leaf and of the fold, of which the rounding is drawn.
      offset: Zero, known when `W₀` may be written over.
      view: How the kernel is a matrix.

    Returns:
      The leaf, and `V'ᵀV`.
    """
    before, after = (vectors(*_states({"": found}))[""] for found in (known, entries))
    whole = kernel_sum(kernel, coordinate, before, view, False, offset)
    if shrink is not None:
        whole = whole * shrink.astype(whole.dtype)
    rest = jnp.zeros_like(coordinate)
    if kernel.dtype != whole.dtype:
        whole, inside = rounded(whole, kernel.dtype, after, view, draw)
        rest = inside.reshape(rest.shape).astype(rest.dtype)
    return Leaf(whole, rest, entries), rotation(after, before)


#: Compiled once for all leaves of a shape. The second gives kernel and S away.
fold_leaf = jax.jit(_fold, static_argnames="view")
fold_in_place = jax.jit(_fold, static_argnames="view", donate_argnums=(0, 1))


def offset_of(entries: Iterable[Entries]) -> jax.Array:
    """A zero that is known when some columns are, and so their pass of the model.

    A compiler that does not know which comes first copies what a pass reads and a
    fold writes.
    """
    found = [entry.refreshes for pair in entries for entry in pair if entry is not None]
    least = jnp.stack([jnp.min(refreshes) for refreshes in found])
    return jnp.minimum(jnp.min(least), 0)


def number_of(path: str) -> jax.Array:
    """A number that tells a leaf from others."""
    return jnp.uint32(zlib.crc32(path.encode()))


def with_leaves(
    coords: Any, frame: Frame, leaves: dict[str, Leaf]
) -> tuple[Any, Frame]:
    """Coordinates and frame with some leaves in place of what they were."""
    put = lambda path, leaf: leaves[path].coordinate if path in leaves else leaf
    kernels = {path: leaf.kernel for path, leaf in leaves.items()}
    states = []
    for place, state in enumerate(frame.columns):
        entries = dict(state.tracked.get("input", {}))
        for path, leaf in leaves.items():
            if (entry := leaf.entries[place]) is not None:
                entries[path] = entry
        tracked = {"input": entries} if entries else {}
        states.append(state._replace(tracked=tracked))
    return map_paths(put, coords), dataclasses.replace(
        frame,
        kernels={**frame.kernels, **kernels},
        columns=ColumnsState(*states),
        folds=frame.folds + 1,
    )


def _states(entries: Mapping[str, Entries]) -> ColumnsState:
    """The columns of some leaves, as one state of them."""

    def state(place: int) -> SpectralState:
        found = {
            path: entry
            for path, pair in entries.items()
            if (entry := pair[place]) is not None
        }
        return SpectralState(jnp.int32(0), {"input": found} if found else {})

    return ColumnsState(state(0), state(1))
