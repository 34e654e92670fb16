"""Multiplying an axis of a leaf by a matrix, along one of the atoms it is made of."""

from collections.abc import Mapping, Sequence

import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace


def map_axis(
    structure: AxisTrace,
    leaf: np.ndarray,
    classes: Sequence[int],
    axis: int,
    atom: int,
    beside: Sequence[int],
    matrix: np.ndarray,
    sizes: Mapping[int, int],
) -> np.ndarray:
    """Multiplies one axis of a leaf by a matrix, along one atom that it is made of.

    Args:
      structure: The function.
      leaf: An array whose axes have `classes`, some perhaps cut already.
      classes: Their classes.
      axis: The axis.
      atom: The atom.
      beside: Atoms that the matrix depends on; the leaf has an axis of each.
      matrix: Shape `(*beside, n, m)`, n the atom's size.
      sizes: The sizes that were cut already.

    Returns:
      The leaf with m in the place of n.
    """
    axes = structure.axes
    active = [(known, index == axis) for index, known in enumerate(classes)]
    after = {**sizes, atom: matrix.shape[-1]}

    def shape(known: Sequence[tuple[int, bool]]) -> list[int]:
        return [axes.resized(one, after if here else sizes) for one, here in known]

    def mapped(array: np.ndarray, known: Sequence[tuple[int, bool]]) -> np.ndarray:
        flat = [
            (axes.find(digit), here)
            for one, here in known
            for digit in axes.digits(one)
        ]
        array = array.reshape([axes.resized(digit, sizes) for digit, _ in flat])
        for index, (digit, here) in enumerate(flat):
            if not here or not axes.is_sum(digit):
                continue
            parts, begin, done = axes.parts(digit), 0, []
            for part in parts:
                end = begin + axes.resized(part, sizes)
                piece = np.take(array, range(begin, end), axis=index)
                own = [*flat[:index], (part, True), *flat[index + 1 :]]
                done.append(mapped(piece, own))
                begin = end
            array = np.concatenate(done, axis=index)
            return array.reshape(shape(known))
        for index, (digit, here) in enumerate(flat):
            if here and digit == atom:
                names = [digit for digit, _ in flat]
                array = _contract(array, names, index, beside, matrix)
        return array.reshape(shape(known))

    return mapped(leaf, active)


def _contract(
    array: np.ndarray,
    names: Sequence[int],
    index: int,
    beside: Sequence[int],
    matrix: np.ndarray,
) -> np.ndarray:
    """Contracts axis `index` with the matrix, entry by entry of what is beside."""
    letters = list(range(len(names)))
    batch = [
        next(i for i, name in enumerate(names) if name == other and i != index)
        for other in beside
    ]
    new = len(names)
    out = [new if i == index else i for i in letters]
    return np.einsum(array, letters, matrix, [*batch, index, new], out, optimize=True)
