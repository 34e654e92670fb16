"""What is known of an array while axes are followed, and what rules do with it."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dsbp_jax.architecture.axes import Axes


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What lays one operand out anew.
LAYOUT = _names(
    "broadcast_in_dim convert_element_type copy copy_p name reduce_precision reshape "
    "squeeze transpose"
)
# Sums and scalings: a rotation of the features passes.
LINEAR = _names(
    "add add_any sub neg mul div convert_element_type copy copy_p reduce_precision "
    "real imag conj stop_gradient name optimization_barrier pcast pvary reshard "
    "sharding_constraint mesh_cast device_put layout_constraint"
)
ELEMENTWISE = LINEAR | _names(
    "abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp complex cos cosh "
    "digamma eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le "
    "lgamma log log1p logistic lt max min ne nextafter not or population_count pow rem "
    "round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign "
    "sin sinh sqrt square tan tanh xor"
)
REDUCTIONS = _names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "argmax argmin"
)
WINDOWS = _names("reduce_window reduce_window_max reduce_window_min reduce_window_sum")

# Marks of a class.
NONLINEAR = "nonlinear"  # its entries do not add up: no rotation passes
REDUCED = "reduced"  # summed over, as by a normalisation


class Value(NamedTuple):
    """What is known of an array.

    Attributes:
      axes: The class of each axis.
      uniform: Whether it is constant along each axis.
      source: The leaf (by path) or the layer (by where it stands) of which it is
        nothing but another layout, or None.
    """

    axes: tuple[int, ...]
    uniform: tuple[bool, ...]
    source: Any = None


def value(axes: Iterable[int], uniform: Iterable[bool] | None = None) -> Value:
    """A value that is constant along no axis, unless said."""
    axes = tuple(axes)
    return Value(axes, tuple(uniform or [False] * len(axes)))


def shape(atom: Any) -> tuple[int, ...]:
    """The shape of an operand or result; () of what is no array."""
    return tuple(getattr(atom.aval, "shape", ()))


def fixed(axes: Axes, sizes: Sequence[int], reason: str) -> Value:
    """A value all of whose axes keep their size."""
    found = value(axes.new(size) for size in sizes)
    for axis in found.axes:
        axes.fix(axis, reason)
    return found


def fix_all(
    axes: Axes, equation: Any, operands: Sequence[Value], reason: str
) -> list[Value]:
    """Every axis of an equation keeps its size."""
    for operand in operands:
        for axis in operand.axes:
            axes.fix(axis, reason)
    return [fixed(axes, shape(var), reason) for var in equation.outvars]


def mark(axes: Axes, operand: Value, said: str) -> None:
    """Marks the axes along which an array varies."""
    for axis, uniform in zip(operand.axes, operand.uniform, strict=True):
        if not uniform:
            axes.mark(axis, said)


def pick(operand: Value, order: Iterable[int]) -> Value:
    """Some axes of an array, in that order."""
    order = list(order)
    return value(
        [operand.axes[axis] for axis in order],
        [operand.uniform[axis] for axis in order],
    )


def with_axis(operand: Value, axis: int, other: int) -> Value:
    """An array with another class for one of its axes."""
    found = list(operand.axes)
    found[axis] = other
    return Value(tuple(found), operand.uniform)
