"""What a model's layers see of the activations of each group, over a stream of batches.

Of each layer that contracts a group the second moments of its input along the group are
summed up, in double precision on the host, batch after batch: nothing else is kept.
Where a group is wider than `MAX_DENSE`, rows are kept in place of a matrix.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.groups import Group
from dsbp_jax.layers import (
    Product,
    Site,
    array_leaves,
    collect_rows,
    evaluate,
    gather_rows,
)

MAX_DENSE = 2048  # widest group whose covariance is formed
_MIN_ROWS = 4096  # rows of one batch and layer, at least where there are so many
_SINGLE = 512  # wider moments are formed in single precision


class Moments:
    """Mean and covariance of the activations of one group at one layer, per entry.

    Attributes:
      count: Rows that were seen.
      mean: Their mean, shape `(entries, n)`.
      second: Their second moment, shape `(entries, n, n)`, or None where rows are kept.
      rows: The rows, shape `(entries, m, n)`, or None.
    """

    def __init__(self, entries: int, size: int):
        self.count = 0
        self._sum = np.zeros((entries, size))
        dense = size <= MAX_DENSE
        self._second = np.zeros((entries, size, size)) if dense else None
        self._rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Adds rows of shape `(entries, m, n)`."""
        size = rows.shape[-1]
        self.count += rows.shape[1]
        self._sum += rows.sum(axis=1, dtype=np.float64)
        if self._second is None:
            kept = max(1, MAX_DENSE // 4)
            self._rows.append(rows[:, :: -(-rows.shape[1] // kept)])
            return
        dtype = np.float64 if size <= _SINGLE else np.float32
        wide = rows.astype(dtype)
        self._second += np.matmul(np.swapaxes(wide, 1, 2), wide)

    @property
    def mean(self) -> np.ndarray:
        """Shape `(entries, n)`."""
        return self._sum / max(self.count, 1)

    def factor(self, centred: bool) -> "Factor":
        """The covariance, or the second moment, as what selection works on."""
        if self._second is None:
            rows = np.concatenate(self._rows, axis=1).astype(np.float64)
            if centred:
                rows = rows - rows.mean(axis=1, keepdims=True)
            return Factor(None, rows / math.sqrt(rows.shape[1]))
        second = self._second / max(self.count, 1)
        if centred:
            second = second - self.mean[:, :, None] * self.mean[:, None, :]
        return Factor(second, None)


class Factor:
    """A stack of covariances: dense, or as scaled rows whose Gram matrices they are."""

    def __init__(self, dense: np.ndarray | None, rows: np.ndarray | None):
        self._dense = dense
        self._rows = rows

    def diagonal(self, entry: int) -> np.ndarray:
        """The variances."""
        if self._dense is not None:
            return np.diagonal(self._dense[entry]).copy()
        assert self._rows is not None
        return np.sum(self._rows[entry] ** 2, axis=0)

    def column(self, entry: int, index: int) -> np.ndarray:
        """The covariances with one neuron."""
        if self._dense is not None:
            return self._dense[entry, :, index]
        assert self._rows is not None
        return self._rows[entry].T @ self._rows[entry][:, index]

    def times(self, entry: int, matrix: np.ndarray) -> np.ndarray:
        """The covariance times a matrix of shape `(n, m)`."""
        if self._dense is not None:
            return self._dense[entry] @ matrix
        assert self._rows is not None
        return self._rows[entry].T @ (self._rows[entry] @ matrix)

    def eigenvalues(self, entry: int) -> np.ndarray:
        """Descending, not negative."""
        if self._dense is not None:
            found = np.linalg.eigvalsh(self._dense[entry])[::-1]
        else:
            assert self._rows is not None
            found = np.linalg.svd(self._rows[entry], compute_uv=False) ** 2
        return np.maximum(found, 0)

    def eigen(self, entry: int) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvectors as columns, and eigenvalues, descending and not negative."""
        if self._dense is not None:
            values, vectors = np.linalg.eigh(self._dense[entry])
            return vectors[:, ::-1], np.maximum(values[::-1], 0)
        assert self._rows is not None
        _, strengths, vectors = np.linalg.svd(self._rows[entry], full_matrices=False)
        return vectors.T, strengths**2

    def repair(self, entry: int, kept: np.ndarray) -> np.ndarray:
        """M of shape `(kept, n)` with `h ≈ h_S M` in least squares."""
        if self._dense is None:
            assert self._rows is not None
            rows = self._rows[entry]
            found = np.linalg.lstsq(rows[:, kept], rows, rcond=None)[0]
        else:
            dense = self._dense[entry]
            block = dense[np.ix_(kept, kept)]
            squares = np.diagonal(block)
            alive = squares > 1e-30 * np.max(squares, initial=1e-300)
            scale = np.where(alive, 1 / np.sqrt(np.where(alive, squares, 1)), 0)
            scaled = scale[:, None] * block * scale
            right = scale[:, None] * dense[kept]
            found = scale[:, None] * np.linalg.lstsq(scaled, right, rcond=1e-12)[0]
        found[:, kept] = np.eye(len(kept))
        return found


def collect(
    structure: AxisTrace,
    groups: Sequence[Group],
    params: Any,
    batches: Iterable[Any],
    structure_of: Callable[[Any], AxisTrace],
) -> dict[tuple[str, str], Moments]:
    """The moments of all groups at all their sinks.

    Args:
      structure: The function, traced on the first batch.
      groups: What to look at.
      params: The parameters.
      batches: The batches; those of one shape share one compiled program.
      structure_of: Traces the function on a batch of another shape.

    Returns:
      By group and sink.
    """
    wanted = {name for group in groups for name in group.sinks}
    sizes = {g.name: math.prod(_entries(structure, g)) for g in groups}
    moments = {
        (group.name, sink): Moments(sizes[group.name], group.size)
        for group in groups
        for sink in group.sinks
    }
    widest = max((group.size for group in groups), default=0)
    limit = max(_MIN_ROWS, 4 * min(widest, MAX_DENSE))
    programs: dict[Any, tuple[AxisTrace, Any]] = {}
    for batch in batches:
        arrays = array_leaves((params, batch))
        key = jax.tree.structure(batch), tuple((a.shape, a.dtype) for a in arrays)
        if key not in programs:
            own = structure if not programs else structure_of(batch)
            programs[key] = own, _program(own, wanted, limit)
        own, program = programs[key]
        found = program(arrays)
        sites = {site.name: site for site in own.traced.sites}
        for group in groups:
            for sink in group.sinks:
                for rows in _rows(own, sites[sink], group, np.asarray(found[sink])):
                    moments[group.name, sink].add(rows)
    return moments


def _program(structure: AxisTrace, wanted: set[str], limit: int) -> Any:
    """From array leaves to the rows that the wanted layers see."""
    sites = [site for site in structure.traced.sites if site.name in wanted]

    def visit(product: Product, x: jax.Array, w: jax.Array, extra: Any) -> Any:
        rows = collect_rows(product.site, x, None, ("inputs",), limit)
        return product(x, w), rows

    def run(arrays: Sequence[Any]) -> dict[str, jax.Array]:
        _, collected = evaluate(structure.traced, visit, arrays, sites=sites)
        found = {}
        for site in sites:
            inputs = gather_rows(site, collected[site.name], ("inputs",), limit).inputs
            assert inputs is not None
            found[site.name] = inputs.astype(
                jnp.promote_types(inputs.dtype, jnp.float32)
            )
        return found

    return jax.jit(run)


def atom_of(structure: AxisTrace, group: Group) -> int:
    """The atom of a group in another trace of its function."""
    return place_atom(structure, group.places[0])


def place_atom(structure: AxisTrace, place: Any) -> int:
    """The atom that stands at a place."""
    atoms = structure.axes.atoms(structure.leaves[place.path][place.axis])
    return structure.axes.find(atoms[place.digit])


def beside_of(structure: AxisTrace, group: Group) -> list[int]:
    """The atoms that the choice along a group may depend on."""
    return [place_atom(structure, place) for place in group.beside]


def _entries(structure: AxisTrace, group: Group) -> list[int]:
    return [structure.axes.size(atom) for atom in beside_of(structure, group)]


def _rows(
    structure: AxisTrace, site: Site, group: Group, rows: np.ndarray
) -> Iterable[np.ndarray]:
    """What one layer saw of a group, as `(entries, m, n)`, once for each part.

    Args:
      structure: The function.
      site: The layer.
      group: The group.
      rows: Its input, shape `(*batch, m, d_in)`.
    """
    axes, leaf = structure.axes, structure.leaves[site.path]
    atom, beside = atom_of(structure, group), beside_of(structure, group)
    batch = [axes.find(d) for a in site.view.batch_axes for d in axes.digits(leaf[a])]
    features = [d for a in site.view.input_axes for d in axes.digits(leaf[a])]
    names = [*batch, -1, *map(axes.find, features)]
    shape = [rows.shape[-2] if name == -1 else axes.size(name) for name in names]
    for piece, own in pieces(structure, rows.reshape(shape), names, atom):
        order = [own.index(other) for other in beside]
        order += [i for i, name in enumerate(own) if name not in (*beside, atom)]
        order.append(own.index(atom))
        piece = np.transpose(piece, order)
        entries = math.prod(piece.shape[: len(beside)])
        yield piece.reshape(entries, -1, group.size)


def pieces(
    structure: AxisTrace, array: np.ndarray, names: list[int], atom: int
) -> Iterable[tuple[np.ndarray, list[int]]]:
    """The parts of an array along whose axes an atom runs, axes as atoms."""
    axes = structure.axes
    for index, name in enumerate(names):
        if name < 0 or not axes.is_sum(name):
            continue
        if atom not in map(axes.find, axes.atoms(name)):
            continue
        begin = 0
        for part in axes.parts(name):
            end = begin + axes.size(part)
            if atom in map(axes.find, axes.atoms(part)):
                digits = [axes.find(digit) for digit in axes.digits(part)]
                own = [*names[:index], *digits, *names[index + 1 :]]
                piece = np.take(array, range(begin, end), axis=index)
                piece = piece.reshape(
                    *array.shape[:index],
                    *map(axes.size, digits),
                    *array.shape[index + 1 :],
                )
                yield from pieces(structure, piece, own, atom)
            begin = end
        return
    yield array, names
