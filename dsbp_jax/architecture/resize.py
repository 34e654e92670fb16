"""Running a traced function on smaller leaves.

The equations stay those of the function at its own sizes, literals included: the
divisor of a mean and the 1/√d of attention are as they were. Only what spells out the
size of an axis that was cut is replaced, equation by equation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dsbp_jax.architecture.axis_walk import DERIVATIVE, AxisTrace, Record
from dsbp_jax.layers import (
    Body,
    Entered,
    Interpreter,
    bind,
    primitive_name,
    with_derivative,
)

_New = Callable[[AxisTrace, Record, Mapping[int, int]], dict[str, Any]]


def run(structure: AxisTrace, sizes: Mapping[int, int], arrays: Sequence[Any]) -> Any:
    """What the function returns for leaves of other sizes.

    Args:
      structure: The function at its own sizes.
      sizes: New sizes of atoms; all others keep theirs.
      arrays: The array leaves of `(params, *args)`, of the new sizes.

    Returns:
      The function's result. Derivative rules of the function's own are kept for first
      derivatives.
    """
    plan: dict[int, Any] = {}
    for key, record in structure.records.items():
        known = (*record.operands, *record.results)
        if any(_changes(structure, value.axes, sizes) for value in known):
            inner = plan
            for index in key[:-1]:
                inner = inner.setdefault(index, {})
            inner[key[-1]] = _resized(structure, record, sizes)
    for key, body in structure.derivatives.items():
        rule: Any = plan
        for index in key[:-1]:
            rule = rule.get(index) if isinstance(rule, dict) else None
        if rule is not None:
            rule[DERIVATIVE] = _Derivative(body, rule.pop(DERIVATIVE, {}))
    outputs, _ = _Resized().run(structure.traced.body, arrays, plan, {}, 0)
    return structure.traced.unflatten(outputs)


def _changes(
    structure: AxisTrace, axes: Sequence[int], sizes: Mapping[int, int]
) -> bool:
    return any(
        structure.axes.resized(axis, sizes) != structure.axes.size(axis)
        or any(atom in sizes for atom in structure.axes.atoms(axis))
        for axis in axes
    )


class _Derivative:
    """The derivative of a rule, and the plan of its equations."""

    def __init__(self, body: Body, plan: dict[int, Any]):
        self.body = body
        self.plan = plan


class _Resized(Interpreter):
    """Binds the equations that `run` replaced."""

    def __init__(self) -> None:
        super().__init__(lambda product, x, w, extra: (product(x, w), None))

    def product(
        self, equation: Any, sites: Any, values: Sequence[Any], extras: Any
    ) -> Any:
        return bind(sites, values), {}

    def rule(self, call: Entered) -> Any:
        found = call.plan.get(DERIVATIVE)
        if not isinstance(found, _Derivative):  # inside of a derivative
            return self.inside(call, call.values, {})
        outputs = with_derivative(
            call.equation,
            lambda values: self.inside(call, values, {})[0],
            lambda values, others: self.run(
                found.body, [*values, *others], found.plan, {}, 0
            )[0],
            call.values,
        )
        return list(outputs), {}


def _resized(structure: AxisTrace, record: Record, sizes: Mapping[int, int]) -> Any:
    """An equation with the parameters that spell out sizes replaced."""
    new = _PARAMS.get(primitive_name(record.equation))
    if new is None:
        return record.equation
    params = {**record.equation.params, **new(structure, record, sizes)}
    return record.equation.replace(params=params)


def _result(
    structure: AxisTrace, record: Record, sizes: Mapping[int, int]
) -> tuple[int, ...]:
    return structure.shape(record.results[0], sizes)


def _slice(structure: AxisTrace, record: Record, sizes: Mapping[int, int]) -> Any:
    params = record.equation.params
    shape = _result(structure, record, sizes)
    strides = params["strides"] or (1,) * len(shape)
    starts, limits = [], []
    for index, axis in enumerate(record.operands[0].axes):
        start, limit = params["start_indices"][index], params["limit_indices"][index]
        if strides[index] == 1:
            start = structure.axes.moved(axis, start, sizes)
            limit = start + shape[index]
        starts.append(start)
        limits.append(limit)
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _split(structure: AxisTrace, record: Record, sizes: Mapping[int, int]) -> Any:
    at = record.equation.params["axis"]
    parts = [structure.axes.resized(part.axes[at], sizes) for part in record.results]
    return {"sizes": tuple(parts)}


def _slice_sizes(structure: AxisTrace, record: Record, sizes: Mapping[int, int]) -> Any:
    """Axes that were whole stay whole."""
    old = record.equation.params["slice_sizes"]
    new = [
        structure.axes.resized(axis, sizes)
        if structure.axes.size(axis) == size
        else size
        for axis, size in zip(record.operands[0].axes, old, strict=True)
    ]
    return {"slice_sizes": tuple(new)}


def _groups(structure: AxisTrace, record: Record, sizes: Mapping[int, int]) -> Any:
    params = record.equation.params
    if params["feature_group_count"] == 1:
        return {}
    channels = record.operands[0].axes[params["dimension_numbers"].lhs_spec[1]]
    return {"feature_group_count": structure.axes.resized(channels, sizes)}


_PARAMS: dict[str, _New] = {
    "broadcast_in_dim": lambda *known: {"shape": _result(*known)},
    "reshape": lambda *known: {"new_sizes": _result(*known)},
    "iota": lambda *known: {"shape": _result(*known)},
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _slice_sizes,
    "gather": _slice_sizes,
    "conv_general_dilated": _groups,
}


def map_axis(
    structure: AxisTrace,
    leaf: jax.Array,
    classes: Sequence[int],
    axis: int,
    atom: int,
    beside: Sequence[int],
    matrix: jax.Array,
    sizes: Mapping[int, int],
) -> jax.Array:
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

    def mapped(array: jax.Array, known: Sequence[tuple[int, bool]]) -> jax.Array:
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
                piece = jax.lax.slice_in_dim(array, begin, end, axis=index)
                own = [*flat[:index], (part, True), *flat[index + 1 :]]
                done.append(mapped(piece, own))
                begin = end
            array = jax.numpy.concatenate(done, axis=index)
            return array.reshape(shape(known))
        for index, (digit, here) in enumerate(flat):
            if here and digit == atom:
                names = [digit for digit, _ in flat]
                array = _contract(array, names, index, beside, matrix)
        return array.reshape(shape(known))

    return mapped(leaf, active)


def _contract(
    array: jax.Array,
    names: Sequence[int],
    index: int,
    beside: Sequence[int],
    matrix: jax.Array,
) -> jax.Array:
    """Contracts axis `index` with the matrix, entry by entry of what is beside."""
    letters = list(range(len(names)))
    batch = [
        next(i for i, name in enumerate(names) if name == other and i != index)
        for other in beside
    ]
    new = len(names)
    out = [new if i == index else i for i in letters]
    return jax.numpy.einsum(
        array, letters, matrix, [*batch, index, new], out, precision="highest"
    )
