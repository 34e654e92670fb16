"""Following a parameter leaf through casts, transposes and reshapes.

A model rarely hands a leaf to a matrix product as it is stored. A `LeafView`
says where each axis of such a rearranged leaf comes from, as digits: the index
along an axis of the leaf is a number, and a reshape splits it into digits of a
mixed radix or lines digits up again.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from dsbp_jax.layers import primitives


class Digit(NamedTuple):
    """Part of the index along one axis of a leaf.

    An index `i` along `axis` contributes `i // stride % size`.
    """

    axis: int
    stride: int
    size: int


@dataclasses.dataclass(frozen=True)
class LeafView:
    """A parameter leaf, rearranged.

    Attributes:
      leaf: Which leaf, an index into the flattened parameters.
      axes: For each axis of the rearranged array the digits it runs through,
        the slowest first.
      loops: For each enclosing loop, outermost first, the digits that it runs
        through, or None where all iterations share the leaf.
      frozen: Whether a `stop_gradient` was met.
    """

    leaf: int
    axes: tuple[tuple[Digit, ...], ...]
    loops: tuple[tuple[Digit, ...] | None, ...] = ()
    frozen: bool = False


def whole(leaf: int, shape: Sequence[int]) -> LeafView:
    """The view of an untouched leaf of shape `shape`."""
    return LeafView(
        leaf, tuple((Digit(axis, 1, size),) for axis, size in enumerate(shape))
    )


def in_order(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """Digits in the order in which the leaf stores them."""
    return tuple(sorted(digits, key=lambda digit: (digit.axis, -digit.stride)))


def follow(
    equation: primitives.Equation, view: LeafView, result: int = 0
) -> LeafView | None:
    """The view after a layout operation.

    Args:
      equation: Any equation with `view` as its operand number `result`.
      view: The leaf as it enters.
      result: The operand, and so the result, in question.

    Returns:
      The leaf as it leaves, or None where the equation does more than lay it
      out anew.
    """
    name, params = equation.primitive.name, equation.params
    axes: tuple[tuple[Digit, ...], ...] | None = None
    if name in primitives.AXISWISE:
        dtype = primitives.aval(equation.outvars[result]).dtype
        axes = view.axes if jnp.issubdtype(dtype, jnp.floating) else None
    elif result:
        return None
    elif name == "transpose":
        axes = tuple(view.axes[axis] for axis in params["permutation"])
    elif name == "squeeze":
        dropped = {axis % len(view.axes) for axis in params["dimensions"]}
        axes = tuple(a for axis, a in enumerate(view.axes) if axis not in dropped)
    elif name == "broadcast_in_dim":
        axes = _expand(view, params["shape"], params["broadcast_dimensions"])
    elif name == "reshape" and params.get("dimensions") is None:
        axes = _reshape(view.axes, params["new_sizes"])
    if axes is None:
        return None
    frozen = view.frozen or name == "stop_gradient"
    return dataclasses.replace(view, axes=axes, frozen=frozen)


def _size(digits: Iterable[Digit]) -> int:
    return math.prod(digit.size for digit in digits)


def _expand(
    view: LeafView, shape: Sequence[int], kept: Sequence[int]
) -> tuple[tuple[Digit, ...], ...] | None:
    """New axes of size one; any real broadcast is no layout operation."""
    axes: list[tuple[Digit, ...]] = [() for _ in shape]
    for digits, axis in zip(view.axes, kept, strict=True):
        axes[axis] = digits
    return tuple(axes) if [_size(a) for a in axes] == list(shape) else None


def _reshape(
    axes: tuple[tuple[Digit, ...], ...], sizes: Sequence[int]
) -> tuple[tuple[Digit, ...], ...] | None:
    """Deals the digits out to axes of the given sizes, splitting where needed."""
    if 0 in sizes:
        return None
    queue = [digit for digits in axes for digit in digits]
    result = []
    for size in sizes:
        digits: list[Digit] = []
        if size == 1:
            if queue and queue[0].size == 1:
                digits = [queue.pop(0)]
            result.append(tuple(digits))
            continue
        while size > 1:
            digit = queue.pop(0)
            if digit.size == 1:
                continue
            if size % digit.size == 0:
                digits.append(digit)
                size //= digit.size
            elif digit.size % size == 0:
                rest = digit.size // size
                digits.append(Digit(digit.axis, digit.stride * rest, size))
                queue.insert(0, Digit(digit.axis, digit.stride, rest))
                size = 1
            else:
                return None
        result.append(tuple(digits))
    return tuple(result)
