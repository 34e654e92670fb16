"""How axes go through random draws, as those of dropout in training."""

from collections.abc import Callable, Sequence
from typing import Any

from dsbp_jax.architecture.axes import Axes
from dsbp_jax.architecture.values import Value, fix_all, shape, value


def _random_bits(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """As many draws as what they mask has entries: their axes unite with its."""
    del operands
    return [value(axes.new(size) for size in shape(equation.outvars[0]))]


def _bitcast(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Entry by entry, unless one is taken apart into several."""
    if shape(equation.outvars[0]) != shape(equation.invars[0]):
        return fix_all(axes, equation, operands, "taken apart into bits")
    return [value(operands[0].axes)]


DRAWS: dict[str, Callable[[Axes, Any, Sequence[Value]], list[Value]]] = {
    "random_bits": _random_bits,
    "bitcast_convert_type": _bitcast,
}
