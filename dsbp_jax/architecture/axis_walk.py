"""A walk over a traced function that finds which axes must keep one size."""

import collections
import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dsbp_jax.architecture import axis_rules
from dsbp_jax.architecture.axes import Axes
from dsbp_jax.architecture.values import LAYOUT, Value, fix_all, fixed, shape, value
from dsbp_jax.layers import (
    Body,
    Forward,
    Trace,
    derivative,
    name_of,
    scan_sizes,
    trace,
)

Key = tuple[int, ...]
DERIVATIVE = -1  # where in the key of a rule its derivative stands


@dataclasses.dataclass(frozen=True)
class Record:
    """One equation that is no call, and the axes that it met.

    Attributes:
      equation: The equation.
      operands: Its operands.
      results: Its results.
      repeats: How often the loops around it run it.
      loops: The classes of these loops, outermost first.
    """

    equation: Any
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    repeats: int
    loops: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class AxisTrace:
    """A traced function with the classes of all its axes.

    Attributes:
      traced: The function.
      axes: The classes.
      leaves: By canonical path the classes of a leaf's axes.
      records: Every equation that is no call, by where it stands.
      derivatives: The derivatives of the rules, likewise.
      biases: By where a layer stands, the leaf that is added to its response and to
        nothing else, and the sign with which it is.
      beside: For an atom, those that stand beside it in every array that has it, the
        loops around it among them: a choice along it may depend on these.
    """

    traced: Trace
    axes: Axes
    leaves: Mapping[str, tuple[int, ...]]
    records: Mapping[Key, Record]
    derivatives: Mapping[Key, Body]
    biases: Mapping[Key, tuple[str, float]]
    beside: Mapping[int, frozenset[int]]

    def flops(self, sizes: Mapping[int, int]) -> int:
        """Operations of all products, for other sizes of some atoms."""
        total = 0
        for key, record in self.records.items():
            if DERIVATIVE not in key and name_of(record.equation) in PRODUCTS:
                left = self.shape(record.operands[0], sizes)
                out = self.shape(record.results[0], sizes)
                total += record.repeats * _flops(record.equation, left, out)
        return total

    def parameters(self, sizes: Mapping[int, int]) -> int:
        """Numbers in all leaves, for other sizes of some atoms."""
        return sum(
            math.prod(self.shape(value(leaf), sizes)) for leaf in self.leaves.values()
        )

    def shape(self, known: Value, sizes: Mapping[int, int]) -> tuple[int, ...]:
        """The shape of an array, for other sizes of some atoms."""
        return tuple(self.axes.resized(axis, sizes) for axis in known.axes)


PRODUCTS = ("dot_general", "conv_general_dilated")


def trace_axes(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...] = ()
) -> AxisTrace:
    """Traces `fn(params, *args)` and finds the classes of its axes.

    Args:
      fn: The function.
      params: Its parameters; arrays or `jax.ShapeDtypeStruct`s.
      args: Its other arguments, likewise.

    Returns:
      The trace.

    Raises:
      ValueError: The function has side effects.
    """
    traced = trace(fn, params, args, {})
    if effects := traced.body.jaxpr.effects:
        named = ", ".join(sorted(str(effect) for effect in effects))
        raise ValueError(f"fn must have no side effects to be cut, got {named}")
    walk = _Walk({site.key for site in traced.sites})
    axes, jaxpr = walk.axes, traced.body.jaxpr
    leaves = {}
    inputs = []
    for path, leaf in traced.leaves.items():
        known = value(axes.new(size) for size in leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            for axis in known.axes:
                axes.fix(axis, f"{leaf.dtype} is no floating type")
        leaves[path] = known.axes
        inputs.append(known._replace(source=path))
    for var in jaxpr.invars[len(inputs) :]:
        inputs.append(fixed(axes, shape(var), "an axis of the input"))
    walk.seen += [(known, ()) for known in inputs]
    for known in walk.walk(jaxpr, inputs, ()):
        walk.used[known.source] += 1
        for axis in known.axes:
            axes.fix(axis, "an axis of the output")
    biases = {
        key: (leaf, sign)
        for key, (leaf, sign) in walk.biases.items()
        if walk.used[key] == walk.used[leaf] == 1
    }
    return AxisTrace(
        traced, axes, leaves, walk.records, walk.derivatives, biases, walk.beside()
    )


def _flops(equation: Any, left: Sequence[int], out: Sequence[int]) -> int:
    """Multiplications and additions of a product, for a left operand and a result.

    Args:
      equation: Any; what is no product counts nothing.
      left: Shape of its first operand.
      out: Shape of its result.

    Returns:
      Twice the number of multiplications.
    """
    name = name_of(equation)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        lhs, rhs, _ = equation.params["dimension_numbers"]
        kernel = shape(equation.invars[1])
        taps = math.prod(kernel[axis] for axis in rhs[2:])
        depthwise = equation.params["feature_group_count"] > 1
        channels = kernel[rhs[1]] if depthwise else left[lhs[1]]
        return 2 * math.prod(out) * taps * channels
    return 0


class _Walk(Forward):
    """Applies the rules; the methods named like a kind of call enter it."""

    def __init__(self, layers: Container[Key]) -> None:
        self.layers = layers
        self.axes = Axes()
        self.used: collections.Counter[Any] = collections.Counter()
        self.biases: dict[Key, tuple[str, float]] = {}
        self.records: dict[Key, Record] = {}
        self.derivatives: dict[Key, Body] = {}
        self.loops: tuple[int, ...] = ()
        self.repeats = 1
        self.seen: list[tuple[Value, tuple[int, ...]]] = []

    def literal(self, atom: Any) -> Value:
        return fixed(self.axes, shape(atom), "a constant of the function")

    def constant(self, var: Any) -> Value:
        said = f"met by an array of shape {shape(var)} that the function closes over"
        return fixed(self.axes, shape(var), said)

    def equation(
        self, equation: Any, operands: Sequence[Value], key: Key
    ) -> list[Value]:
        results = axis_rules.apply(self.axes, equation, operands)
        if DERIVATIVE not in key:
            results = self.sources(equation, operands, results, key)
        self.records[key] = Record(
            equation, tuple(operands), tuple(results), self.repeats, self.loops
        )
        self.seen += [(result, self.loops) for result in results]
        return results

    def sources(
        self, equation: Any, operands: Sequence[Value], results: list[Value], key: Key
    ) -> list[Value]:
        """Follows leaves and responses through layouts until they are used."""
        name = name_of(equation)
        if name in LAYOUT:
            return [results[0]._replace(source=operands[0].source)]
        self.used.update(operand.source for operand in operands)
        if name in ("add", "sub"):
            left, right = (operand.source for operand in operands)
            if name == "add" and isinstance(left, str):
                left, right = right, left
            if isinstance(left, tuple) and isinstance(right, str):
                self.biases[left] = right, 1.0 if name == "add" else -1.0
        if key in self.layers:
            return [results[0]._replace(source=key)]
        return results

    def rule(
        self, equation: Any, bodies: Any, operands: Sequence[Value], key: Key
    ) -> list[Value]:
        """The body, and the derivative, so that both can run at other sizes."""
        if DERIVATIVE in key:  # the primal, in its own derivative
            return self.call(equation, bodies, operands, key)
        found = derivative(equation)
        if found is None:
            said = f"inside {name_of(equation)}, which has no derivative to run"
            return fix_all(self.axes, equation, operands, said)
        results = self.call(equation, bodies, operands, key)
        at = (*key, DERIVATIVE)
        self.derivatives[at] = found
        moving = len(found.jaxpr.invars) - len(operands)
        floating = [
            operand
            for operand, atom in zip(operands, equation.invars, strict=True)
            if jnp.issubdtype(atom.aval.dtype, jnp.inexact)
        ]
        forward = "jvp" in name_of(equation)
        others = floating if forward else results
        assert len(others) == moving
        outputs = self.walk(found.jaxpr, [*operands, *others], at)
        self.unite(outputs, results if forward else floating)
        return results

    def unite(self, left: Sequence[Value], right: Sequence[Value]) -> None:
        for a, b in zip(left, right, strict=True):
            for i, j in zip(a.axes, b.axes, strict=True):
                self.axes.unite(i, j)

    def scan(
        self, equation: Any, bodies: Any, operands: Sequence[Value], key: Key
    ) -> list[Value]:
        """Carries unite; what is stacked loses an axis that is the loop's."""
        num_consts, num_carry = scan_sizes(equation)
        length = equation.params["length"]
        loop = self.axes.new(length)
        self.axes.fix(loop, "stacked over a loop")
        carried = num_consts + num_carry
        inner = [
            value(operand.axes) if index >= num_consts else operand
            for index, operand in enumerate(operands[:carried])
        ]
        for operand in operands[carried:]:
            self.axes.unite(operand.axes[0], loop)
            inner.append(Value(operand.axes[1:], operand.uniform[1:], operand.source))
        before = self.loops, self.repeats
        self.loops, self.repeats = (*self.loops, loop), self.repeats * length
        # What enters is seen inside as well, beside the loop that it is sliced by.
        self.seen += [(known, self.loops) for known in inner[carried:]]
        results = self.walk(bodies[0].jaxpr, inner, key)
        self.loops, self.repeats = before
        self.unite(inner[num_consts:carried], results[:num_carry])
        stacked = [
            Value((loop, *known.axes), (False, *known.uniform))
            for known in results[num_carry:]
        ]
        outer = [value(known.axes) for known in results[:num_carry]]
        self.seen += [(known, self.loops) for known in (*outer, *stacked)]
        return [*outer, *stacked]

    def cond(
        self, equation: Any, bodies: Any, operands: Sequence[Value], key: Key
    ) -> list[Value]:
        """Branches: their results unite."""
        branches = [
            self.walk(body.jaxpr, operands[1:], (*key, branch))
            for branch, body in enumerate(bodies)
        ]
        for other in branches[1:]:
            self.unite(branches[0], other)
        return [value(known.axes) for known in branches[0]]

    def beside(self) -> dict[int, frozenset[int]]:
        """For each atom the atoms that are beside it in every array."""
        found: dict[int, frozenset[int]] = {}
        for known, loops in self.seen:
            atoms = list(self._atoms(known))
            around = frozenset(self.axes.find(loop) for loop in loops)
            whole = frozenset(atom for atom, _ in atoms) | around
            for atom, uniform in atoms:
                if not uniform:
                    found[atom] = found.get(atom, whole) & whole
        return {atom: others - {atom} for atom, others in found.items()}

    def _atoms(self, known: Value) -> Iterator[tuple[int, bool]]:
        for axis, uniform in zip(known.axes, known.uniform, strict=True):
            for atom in self.axes.atoms(axis):
                yield self.axes.find(atom), uniform
