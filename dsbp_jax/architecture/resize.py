"""Running a traced function on smaller leaves.

The equations stay those of the function at its own sizes, literals included: the
divisor of a mean and the 1/√d of attention are as they were. Only what spells out the
size of an axis that was cut is replaced, equation by equation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import DERIVATIVE, AxisTrace, Record
from dsbp_jax.layers import (
    Body,
    Entered,
    Interpreter,
    bind,
    name_of,
    with_derivative,
)

_New = Callable[[AxisTrace, Record, Mapping[int, int]], dict[str, Any]]


def run(
    structure: AxisTrace,
    sizes: Mapping[int, int],
    arrays: Sequence[Any],
    weights: Mapping[int, np.ndarray] | None = None,
) -> Any:
    """What the function returns for leaves of other sizes.

    Args:
      structure: The function at its own sizes.
      sizes: New sizes of atoms; all others keep theirs.
      arrays: The array leaves of `(params, *args)`, of the new sizes.
      weights: For some of these atoms what each entry counts in sums along them.

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
            resized = _resized(structure, record, sizes)
            inner[key[-1]] = _weighted(structure, record, weights or {}, resized)
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


class _Weighted(NamedTuple):
    """A sum over entries that stand for several, each with its number."""

    equation: Any
    axes: Mapping[int, np.ndarray]

    def weigh(self, values: Sequence[Any]) -> list[Any]:
        (array,) = values
        for axis, weights in self.axes.items():
            shape = [-1 if other == axis else 1 for other in range(array.ndim)]
            array = array * jnp.asarray(weights.reshape(shape), array.dtype)
        return [array]


def _weighted(
    structure: AxisTrace,
    record: Record,
    weights: Mapping[int, np.ndarray],
    equation: Any,
) -> Any:
    if name_of(equation) != "reduce_sum":
        return equation
    known, axes = record.operands[0], structure.axes
    found = {
        axis: weights[atom]
        for axis in equation.params["axes"]
        for atom in map(axes.find, axes.atoms(known.axes[axis]))
        if atom in weights
    }
    return _Weighted(equation, found) if found else equation


class _Resized(Interpreter):
    """Binds the equations that `run` replaced."""

    def __init__(self) -> None:
        super().__init__(lambda product, x, w, extra: (product(x, w), None))

    def product(
        self, equation: Any, sites: Any, values: Sequence[Any], extras: Any
    ) -> Any:
        if isinstance(sites, _Weighted):
            return bind(sites.equation, sites.weigh(values)), {}
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
    new = _PARAMS.get(name_of(record.equation))
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
    "random_bits": lambda *known: {"shape": _result(*known)},
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _slice_sizes,
    "gather": _slice_sizes,
    "conv_general_dilated": _groups,
}
