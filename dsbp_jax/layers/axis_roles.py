"""Products: the roles that the axes of a weight play in one equation.

The dimension numbers of a matrix product or a convolution say which axes of the
weight are contracted, kept or shared with the input. From them, and from where
each axis comes from in the leaf, follow the leaf's matrix view and the layout
of the input and the response.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsbp_jax.layers import primitives
from dsbp_jax.layers.leaf_view import LeafView, Span
from dsbp_jax.layers.matrix_view import MatrixView
from dsbp_jax.layers.sites import Axes, Operand


class Roles(NamedTuple):
    """The axes of a weight by what becomes of them, and the rest of the equation.

    Attributes:
      batch: Axes shared with the input, with their digits.
      contracted: Axes contracted with it.
      kept: Axes that the response keeps.
      inputs: Layout of the input.
      outputs: Layout of the response.
    """

    batch: Axes
    contracted: Axes
    kept: Axes
    inputs: Operand
    outputs: Operand

    def view(self, shape: Sequence[int], leaf: LeafView) -> MatrixView | str:
        """The matrix view of a leaf of shape `shape`, or why there is none."""
        loops = [(0, loop) for loop in leaf.loops if loop is not None]
        named = {
            "input": self.contracted,
            "output": self.kept,
            "batch": [*self.batch, *loops],
        }
        roles: dict[int, set[str]] = {}
        covered = [1] * len(shape)
        for role, axes in named.items():
            for _, digits in axes:
                for digit in digits:
                    roles.setdefault(digit.axis, set()).add(role)
                    covered[digit.axis] *= digit.size
        for axis, found in roles.items():
            if len(found) > 1 or covered[axis] != shape[axis]:
                return f"axis {axis} of the leaf is split between several roles"
        of = lambda role: tuple(sorted(axis for axis in roles if role in roles[axis]))
        if not of("input") or not of("output"):
            return "met as a vector: a matrix has both a contracted and a kept axis"
        return MatrixView(of("input"), of("output"), of("batch"))


def _spans(view: LeafView, axes: Mapping[int, int]) -> tuple[Span, ...]:
    """The spans of a weight, on those axes of another operand that meet its own."""
    return tuple(
        span._replace(axis=axes[span.axis]) for span in view.spans if span.axis in axes
    )


def dense(equation: primitives.Equation, view: LeafView, position: int) -> Roles:
    """Roles of the axes of a matrix product with the weight at `position`."""
    contracted, batched = equation.params["dimension_numbers"]
    shape = primitives.aval(equation.invars[1 - position]).shape
    named = lambda axes: tuple((axis, view.axes[axis]) for axis in axes)
    contract, batch = named(contracted[position]), named(batched[position])
    taken = {axis for axis, _ in (*contract, *batch)}
    kept = named(axis for axis in range(len(view.axes)) if axis not in taken)
    # The response lists the batch axes, then the left and the right operand's.
    leading = len(batch)
    other_taken = {*contracted[1 - position], *batched[1 - position]}
    rows = tuple(axis for axis in range(len(shape)) if axis not in other_taken)
    first_kept = leading if position == 0 else leading + len(rows)
    first_row = leading + len(kept) if position == 0 else leading
    digits = lambda axes: [digits for _, digits in axes]
    met = dict(zip(contracted[position], contracted[1 - position], strict=True))
    met.update(zip(batched[position], batched[1 - position], strict=True))
    answered = {axis: index for index, axis in enumerate(batched[position])}
    answered.update((axis, index) for index, (axis, _) in enumerate(kept, first_kept))
    operand = Operand(
        shape,
        tuple(zip(batched[1 - position], digits(batch), strict=True)),
        rows,
        tuple(zip(contracted[1 - position], digits(contract), strict=True)),
        _spans(view, met),
    )
    response = Operand(
        primitives.aval(equation.outvars[0]).shape,
        tuple(enumerate(digits(batch))),
        tuple(range(first_row, first_row + len(rows))),
        tuple(enumerate(digits(kept), first_kept)),
        _spans(view, answered),
    )
    return Roles(batch, contract, kept, operand, response)


def convolution(
    equation: primitives.Equation, view: LeafView, position: int
) -> Roles | str:
    """Roles of the axes of a convolution kernel, or why it is no site."""
    params = equation.params
    if position == 0:
        return "convolved with a kernel that is no parameter"
    if params["feature_group_count"] != 1:
        return "kernel of a grouped or depthwise convolution"
    if params["batch_group_count"] != 1:
        return "kernel of a convolution with batch groups"
    lhs, rhs, out = params["dimension_numbers"]
    kept, contract = ((rhs[axis], view.axes[rhs[axis]]) for axis in (0, 1))
    if any(span.axis in rhs[2:] for span in view.spans):
        return "some taps of a convolution kernel that is joined from several leaves"
    operand, response = (
        Operand(
            primitives.aval(atom).shape,
            (),
            (spec[0], *spec[2:]),
            ((spec[1], digits),),
            _spans(view, {axis: spec[1]}),
        )
        for atom, spec, (axis, digits) in (
            (equation.invars[0], lhs, contract),
            (equation.outvars[0], out, kept),
        )
    )
    return Roles((), (contract,), (kept,), operand, response)
