"""Following a parameter leaf through casts, transposes, reshapes and joints.

A model rarely hands a leaf to a matrix product as it is stored. A `LeafView`
says where each axis of such a rearranged leaf comes from, as digits: the index
along an axis of the leaf is a number, and a reshape splits it into digits of a
mixed radix or lines digits up again. Of an array that several leaves were joined
into, each leaf is one block, and its view says which.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.layers import primitives


class Digit(NamedTuple):
    """Part of the index along one axis of a leaf.

    An index `i` along `axis` contributes `i // stride % size`, counted from the end
    where it is flipped.
    """

    axis: int
    stride: int
    size: int
    flipped: bool = False


class Span(NamedTuple):
    """Where a leaf lies along one axis of an array that it was joined into."""

    axis: int
    start: int
    size: int
    whole: int


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
      spans: The axes that it shares with the other leaves of a joint array.
    """

    leaf: int
    axes: tuple[tuple[Digit, ...], ...]
    loops: tuple[tuple[Digit, ...] | None, ...] = ()
    frozen: bool = False
    spans: tuple[Span, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the array, all leaves that were joined into it together."""
        sizes = [math.prod(digit.size for digit in digits) for digits in self.axes]
        for span in self.spans:
            sizes[span.axis] = span.whole
        return tuple(sizes)


def whole(leaf: int, shape: Sequence[int]) -> LeafView:
    """The view of an untouched leaf of shape `shape`."""
    return LeafView(
        leaf, tuple((Digit(axis, 1, size),) for axis, size in enumerate(shape))
    )


def in_order(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """Digits in the order in which the leaf stores them."""
    return tuple(sorted(digits, key=lambda digit: (digit.axis, -digit.stride)))


def unflip(array: jax.Array, digits: Sequence[Digit | None]) -> jax.Array:
    """Reverses the axes of an array whose digits are flipped; its own inverse."""
    axes = [axis for axis, digit in enumerate(digits) if digit and digit.flipped]
    return jax.lax.rev(array, axes) if axes else array


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
    name, params = primitives.name_of(equation), equation.params
    if name in primitives.AXISWISE:
        dtype = primitives.aval(equation.outvars[result]).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(view, frozen=view.frozen or name == "stop_gradient")
    if result:
        return None
    if name == "transpose":
        return _pick(view, params["permutation"])
    if name == "squeeze":
        ndim = len(view.axes)
        dropped = {axis % ndim for axis in params["dimensions"]}
        return _pick(view, [axis for axis in range(ndim) if axis not in dropped])
    if name == "rev":
        return _flip(view, params["dimensions"])
    if name == "broadcast_in_dim":
        return _expand(view, params["shape"], params["broadcast_dimensions"])
    if name == "reshape" and params.get("dimensions") is None:
        return _reshape(view, params["new_sizes"])
    return None


def join(
    equation: primitives.Equation, view: LeafView, operand: int
) -> LeafView | None:
    """The view of a leaf after it is concatenated or stacked with other arrays.

    Args:
      equation: Any equation with `view` as its operand number `operand`.
      view: The leaf as it enters.
      operand: Which operand it is.

    Returns:
      The leaf as a block of the result, or None where the equation joins nothing.
    """
    name, shape = equation.primitive.name, primitives.aval(equation.outvars[0]).shape
    if name == "stack":
        axis = equation.params["axis"] % len(shape)
        view, width, start = _insert(view, axis), 1, operand
    elif name == "concatenate":
        axis = equation.params["dimension"]
        widths = [primitives.aval(atom).shape[axis] for atom in equation.invars]
        width, start = widths[operand], sum(widths[:operand])
    else:
        return None
    if width == shape[axis]:
        return view
    old = {span.axis: span for span in view.spans}
    before, size = (old[axis].start, old[axis].size) if axis in old else (0, width)
    old[axis] = Span(axis, start + before, size, shape[axis])
    return dataclasses.replace(view, spans=tuple(sorted(old.values())))


def enter_shared(view: LeafView) -> LeafView:
    """A leaf as each iteration of a loop sees it."""
    return dataclasses.replace(view, loops=(*view.loops, None))


def enter_stacked(view: LeafView) -> LeafView:
    """The slice of a stacked leaf that one iteration of a loop sees."""
    loops = (*view.loops, view.axes[0])
    return dataclasses.replace(_pick(view, range(1, len(view.axes))), loops=loops)


def leave(view: LeafView) -> LeafView:
    """A leaf after the loop: the inverse of the former two."""
    *loops, last = view.loops
    if last is not None:
        view = _insert(view, 0)
        view = dataclasses.replace(view, axes=(last, *view.axes[1:]))
    return dataclasses.replace(view, loops=tuple(loops))


def _size(digits: Iterable[Digit]) -> int:
    return math.prod(digit.size for digit in digits)


def _pick(view: LeafView, order: Sequence[int]) -> LeafView:
    """The axes `order` of a view; those left out have size one."""
    spans = [
        span._replace(axis=list(order).index(span.axis))
        for span in view.spans
        if span.axis in order
    ]
    axes = tuple(view.axes[axis] for axis in order)
    return dataclasses.replace(view, axes=axes, spans=tuple(sorted(spans)))


def _insert(view: LeafView, axis: int) -> LeafView:
    """A new axis of size one."""
    spans = tuple(
        span._replace(axis=span.axis + (span.axis >= axis)) for span in view.spans
    )
    axes = (*view.axes[:axis], (), *view.axes[axis:])
    return dataclasses.replace(view, axes=axes, spans=spans)


def _flip(view: LeafView, axes: Sequence[int]) -> LeafView:
    """Some axes in reverse; of a number, that reverses each of its digits."""
    flip = lambda digit: digit._replace(flipped=not digit.flipped)
    return dataclasses.replace(
        view,
        axes=tuple(
            tuple(map(flip, digits)) if axis in axes else digits
            for axis, digits in enumerate(view.axes)
        ),
        spans=tuple(
            span._replace(start=span.whole - span.start - span.size)
            if span.axis in axes
            else span
            for span in view.spans
        ),
    )


def _expand(
    view: LeafView, shape: Sequence[int], kept: Sequence[int]
) -> LeafView | None:
    """New axes of size one; any real broadcast is no layout operation."""
    axes: list[tuple[Digit, ...]] = [() for _ in shape]
    for digits, axis in zip(view.axes, kept, strict=True):
        axes[axis] = digits
    spans = tuple(span._replace(axis=kept[span.axis]) for span in view.spans)
    expanded = dataclasses.replace(view, axes=tuple(axes), spans=spans)
    return expanded if expanded.sizes == tuple(shape) else None


def _reshape(view: LeafView, sizes: Sequence[int]) -> LeafView | None:
    """A reshape; of a joint array one that leaves each leaf a block."""
    if 0 in sizes:
        return None
    own, spans = list(sizes), view.spans
    if spans:
        if len(spans) > 1:
            return None
        (span,), old = spans, view.sizes
        # The last new axis with as much in front of it as the joint one had.
        ahead = math.prod(old[: span.axis])
        found = [i for i in range(len(own)) if math.prod(own[:i]) == ahead]
        if not found:
            return None
        axis = found[-1]
        inner, step = math.prod(old[span.axis + 1 :]), math.prod(own[axis + 1 :])
        if span.start * inner % step or span.size * inner % step:
            return None
        start, own[axis] = span.start * inner // step, span.size * inner // step
        spans = (Span(axis, start, own[axis], sizes[axis]),)
    axes = _deal(view.axes, own)
    if axes is None:
        return None
    return dataclasses.replace(view, axes=axes, spans=spans)


def _deal(
    axes: tuple[tuple[Digit, ...], ...], sizes: Sequence[int]
) -> tuple[tuple[Digit, ...], ...] | None:
    """Deals the digits out to axes of the given sizes, splitting where needed."""
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
                stride = digit.stride * rest
                digits.append(digit._replace(stride=stride, size=size))
                queue.insert(0, digit._replace(size=rest))
                size = 1
            else:
                return None
        result.append(tuple(digits))
    return tuple(result)
