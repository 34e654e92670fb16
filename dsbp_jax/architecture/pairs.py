"""Widths that two activations contract, as queries with keys in attention.

No kernel follows that could be repaired: an entry of `q·k = Σ_d q_d k_d` is kept or
dropped. With q and k of independent rows, dropping the set D loses
`Σ_{d,d'∈D} C_q[d,d'] C_k[d,d']` of the products' mean square.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace, Key, Record
from dsbp_jax.architecture.groups import Group, atom_of, beside_of
from dsbp_jax.architecture.selection import Order
from dsbp_jax.architecture.values import Value
from dsbp_jax.layers import Interpreter, Site, bind, plan_of


class PairMoments:
    """Second moments of both sides of one product, per entry.

    Attributes:
      left: Shape `(entries, n, n)`, a mean over rows.
      right: Likewise.
    """

    def __init__(self, entries: int, size: int):
        self.left = np.zeros((entries, size, size))
        self.right = np.zeros((entries, size, size))
        self._batches = 0

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        """Adds the moments of one batch."""
        self._batches += 1
        for mean, new in ((self.left, left), (self.right, right)):
            mean += (new - mean) / self._batches


class _Probe:
    """What to look at in one equation: a name for each group that it contracts."""

    def __init__(self, record: Record, wanted: Sequence[tuple[str, int, list[int]]]):
        self.record = record
        self.wanted = wanted


class _Probing(Interpreter):
    """Visits sites, and keeps moments of what pairs contract."""

    def __init__(self, structure: AxisTrace, visit: Any):
        super().__init__(visit)
        self.structure = structure

    def product(
        self, equation: Any, sites: Any, values: Sequence[Any], extras: Any
    ) -> Any:
        if not isinstance(sites, _Probe):
            return super().product(equation, sites, values, extras)
        found = {}
        for name, atom, beside in sites.wanted:
            for side in (0, 1):
                known = sites.record.operands[side]
                found[f"{name}/{side}"] = _second(
                    self.structure, values[side], known, atom, beside
                )
        return bind(equation, values), found


def probing(
    structure: AxisTrace, groups: Sequence[Group], sites: Sequence[Site], visit: Any
) -> Any:
    """A run of the function that visits sites as `evaluate` does, and pairs as well.

    Args:
      structure: The function.
      groups: Those with pairs.
      sites: What to visit.
      visit: As for `evaluate`.

    Returns:
      From the array leaves of `(params, x)` to what was collected: by site, and by
      group, pair and side the second moments.
    """
    probes: dict[Key, list[tuple[str, int, list[int]]]] = {}
    for group in groups:
        atom, beside = atom_of(structure, group), beside_of(structure, group)
        for index, key in enumerate(group.pairs):
            probes.setdefault(key, []).append((f"{group.name}/{index}", atom, beside))
    plan = plan_of(sites)
    for key, wanted in probes.items():
        inner = plan
        for step in key[:-1]:
            inner = inner.setdefault(step, {})
        inner[key[-1]] = _Probe(structure.records[key], wanted)

    def run(arrays: Sequence[Any]) -> dict[str, jax.Array]:
        body = structure.traced.body
        return _Probing(structure, visit).run(body, arrays, plan, {}, 0)[1]

    return run


def add(
    structure: AxisTrace,
    groups: Sequence[Group],
    found: Mapping[str, Any],
    moments: Mapping[str, list[PairMoments]],
) -> None:
    """Adds what one run of `program` found."""
    for group in groups:
        beside = beside_of(structure, group)
        for index, key in enumerate(group.pairs):
            loops = structure.records[key].loops
            sides = [
                _entries(
                    structure,
                    np.asarray(found[f"{group.name}/{index}/{side}"]),
                    loops,
                    beside,
                )
                for side in (0, 1)
            ]
            moments[group.name][index].add(*sides)


def _entries(
    structure: AxisTrace, array: np.ndarray, loops: Sequence[int], beside: list[int]
) -> np.ndarray:
    """Moments `(*loops, *beside that are no loops, n, n)` as `(entries, n, n)`."""
    names = [structure.axes.find(loop) for loop in loops]
    names += [name for name in beside if name not in names]
    shared = tuple(i for i, name in enumerate(names) if name not in beside)
    array = array.mean(axis=shared) if shared else array
    names = [name for name in names if name in beside]
    order = [names.index(name) for name in beside]
    array = np.transpose(array, [*order, array.ndim - 2, array.ndim - 1])
    return array.reshape(-1, *array.shape[-2:])


def _second(
    structure: AxisTrace, array: jax.Array, known: Value, atom: int, beside: list[int]
) -> jax.Array:
    """The mean of `hhᵀ` along an atom, for each entry of those beside it."""
    axes = structure.axes
    names = [axes.find(digit) for axis in known.axes for digit in axes.digits(axis)]
    array = array.reshape([axes.size(name) for name in names])
    own = [names.index(name) for name in beside if name in names]
    rest = [i for i, name in enumerate(names) if name != atom and i not in own]
    array = jnp.transpose(array, [*own, *rest, names.index(atom)])
    shape = [array.shape[i] for i in range(len(own))]
    rows = math.prod(array.shape[len(own) : -1])
    array = array.reshape(*shape, rows, array.shape[-1])
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    product = jnp.einsum("...rn,...rm->...nm", array, array, precision="highest")
    return product / rows


def order(moments: Iterable[PairMoments], entry: int) -> tuple[Order, float]:
    """Orders the entries of a pair by what their products add, the best first."""
    both = [one.left[entry] * one.right[entry] for one in moments]
    return by_loss(sum(both[1:], start=both[0]))


def by_loss(both: np.ndarray) -> tuple[Order, float]:
    """Orders entries by what is lost with them, the last to go first.

    The one that adds the least to what is lost is dropped first, and so on.

    Args:
      both: Shape `(n, n)`: without the entries of a set D, the sum of `both` over
        `D × D` is lost.

    Returns:
      The order, and the sum of all.
    """
    size, total = len(both), float(both.sum())
    left = np.ones(size, bool)
    lost, dropped, errors = 0.0, [], [0.0]
    cross = np.zeros(size)  # with what is dropped already
    for _ in range(size):
        cost = np.where(left, np.diagonal(both) + 2 * cross, np.inf)
        pick = int(np.argmin(cost))
        lost += max(float(cost[pick]), 0.0)
        left[pick] = False
        cross += both[:, pick]
        dropped.append(pick)
        errors.append(lost)
    scale = max(total, 1e-300)
    return Order(np.array(dropped[::-1]), np.array(errors[::-1]) / scale), total


def spectrum(moments: PairMoments, entry: int) -> np.ndarray:
    """Eigenvalues of `C_q C_k`: what the best directions of the products are worth."""
    found = np.linalg.eigvals(moments.left[entry] @ moments.right[entry]).real
    return np.maximum(np.sort(found)[::-1], 0)
