"""A pass over a stream of batches: what layers and pairs see of each group.

Of each layer that contracts a group, rows of its input come to the host and are summed
up there, batch after batch: nothing else is kept. Of pairs the sums are made on the
device.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.groups import Group, atom_of, beside_of
from dsbp_jax.architecture.moments import MAX_DENSE, Moments, is_exact
from dsbp_jax.architecture.pairs import PairMoments, add, probing
from dsbp_jax.layers import (
    Product,
    Site,
    array_leaves,
    collect_rows,
    gather_rows,
)

_MIN_ROWS = 4096  # rows of one batch and layer, at least where there are so many


class Seen(NamedTuple):
    """What was seen of all groups.

    Attributes:
      sinks: By group and layer.
      pairs: By group, one for each product.
    """

    sinks: dict[tuple[str, str], Moments]
    pairs: dict[str, list[PairMoments]]

    def pop(self, group: Group) -> "Seen":
        """What was seen of one group, and no longer held here: it may be large."""
        mine = [key for key in self.sinks if key[0] == group.name]
        return Seen(
            {key: self.sinks.pop(key) for key in mine},
            {group.name: self.pairs.pop(group.name, [])},
        )


def collect(
    structure: AxisTrace,
    groups: Sequence[Group],
    params: Any,
    batches: Iterable[Any],
    structure_of: Callable[[Any], AxisTrace],
    energy: float | None = None,
) -> Seen:
    """What is seen of all groups, at all their sinks and pairs.

    Args:
      structure: The function, traced on the first batch.
      groups: What to look at.
      params: The parameters.
      batches: The batches; those of one shape share one compiled program.
      structure_of: Traces the function on a batch of another shape.
      energy: What is to be kept: of all of it, moments are in double precision.

    Returns:
      What was seen.
    """
    wanted = {name for group in groups for name in group.sinks}
    sizes = {g.name: math.prod(g.entries) for g in groups}
    moments = {
        (group.name, sink): Moments(
            sizes[group.name], group.size, exact=is_exact(group.size, energy)
        )
        for group in groups
        for sink in group.sinks
    }
    paired = [group for group in groups if group.pairs]
    pairs = {
        group.name: [PairMoments(sizes[group.name], group.size) for _ in group.pairs]
        for group in paired
    }
    widest = max((group.size for group in groups), default=0)
    limit = max(_MIN_ROWS, 4 * min(widest, MAX_DENSE))
    programs: dict[Any, tuple[AxisTrace, Any]] = {}
    for batch in batches:
        arrays = array_leaves((params, batch))
        key = jax.tree.structure(batch), tuple((a.shape, a.dtype) for a in arrays)
        if key not in programs:
            own = structure if not programs else structure_of(batch)
            programs[key] = own, _program(own, wanted, paired, limit)
        own, run = programs[key]
        found = run(arrays)
        sites = {site.name: site for site in own.traced.sites}
        for sink in sorted(wanted):
            rows = np.asarray(found.pop(sink))  # so that they are freed one by one
            for group in groups:
                if sink in group.sinks:
                    for part in rows_of(own, sites[sink], group, rows):
                        moments[group.name, sink].add(part)
        if paired:
            add(own, paired, found, pairs)
    return Seen(moments, pairs)


def _program(
    structure: AxisTrace, wanted: set[str], paired: Sequence[Group], limit: int
) -> Any:
    """From array leaves to rows that the wanted layers see, and moments of pairs."""
    sites = [site for site in structure.traced.sites if site.name in wanted]

    def visit(product: Product, x: jax.Array, w: jax.Array, extra: Any) -> Any:
        rows = collect_rows(product.site, x, None, ("inputs",), limit)
        return product(x, w), rows

    probe = probing(structure, paired, sites, visit)

    def run(arrays: Sequence[Any]) -> dict[str, jax.Array]:
        collected = probe(arrays)
        names = {site.name for site in sites}
        found = {n: one for n, one in collected.items() if n not in names}
        for site in sites:
            inputs = gather_rows(site, collected[site.name], ("inputs",), limit).inputs
            assert inputs is not None
            found[site.name] = inputs.astype(
                jnp.promote_types(inputs.dtype, jnp.float32)
            )
        return found

    return jax.jit(run)


def rows_of(
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
    for piece, own in _pieces(structure, rows.reshape(shape), names, atom):
        order = [own.index(other) for other in beside]
        order += [i for i, name in enumerate(own) if name not in (*beside, atom)]
        order.append(own.index(atom))
        piece = np.transpose(piece, order)
        entries = math.prod(piece.shape[: len(beside)])
        yield piece.reshape(entries, -1, group.size)


def _pieces(
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
                yield from _pieces(structure, piece, own, atom)
            begin = end
        return
    yield array, names
