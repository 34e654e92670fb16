"""What each primitive does to the axes of its operands: one rule per primitive.

A rule gives the axis classes of an equation's results, and unites or fixes those of
its operands. What has no rule fixes every axis that it meets, by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dsbp_jax.architecture.axes import UNIT, Axes
from dsbp_jax.architecture.draw_rules import DRAWS
from dsbp_jax.architecture.values import (
    ELEMENTWISE,
    LINEAR,
    NONLINEAR,
    REDUCED,
    REDUCTIONS,
    WINDOWS,
    Value,
    fix_all,
    fixed,
    mark,
    pick,
    shape,
    value,
    with_axis,
)
from dsbp_jax.layers import name_of

Rule = Callable[[Axes, Any, Sequence[Value]], list[Value]]

_ALONG_AXIS = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
    "top_k": "axis",
}


def apply(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of one equation that is no call."""
    name = name_of(equation)
    rule = _RULES.get(name)
    if rule is None:
        return fix_all(axes, equation, operands, f"met by {name}, which has no rule")
    return rule(axes, equation, operands)


def _elementwise(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Axis i of all operands and of the result is one; scalars meet any."""
    name = name_of(equation)
    if len(equation.outvars) > 1:  # a barrier: the i-th result is the i-th operand
        return list(operands)
    sizes = shape(equation.outvars[0])
    found, flags = [], []
    for index, size in enumerate(sizes):
        # Scalars, and axes of size one, are repeated along the axis.
        met = [
            (operand.axes[index], operand.uniform[index])
            for operand in operands
            if operand.axes and axes.size(operand.axes[index]) == size
        ]
        for axis, _ in met[1:]:
            axes.unite(met[0][0], axis)
        found.append(met[0][0])
        flags.append(all(uniform for _, uniform in met))
        varies = [
            bool(operand.axes)
            and axes.size(operand.axes[index]) == size
            and not operand.uniform[index]
            for operand in operands
        ]
        if not flags[-1] and not _is_linear(name, varies):
            axes.mark(found[-1], NONLINEAR)
    return [value(found, flags)]


def _is_linear(name: str, varies: Sequence[bool]) -> bool:
    """Whether an operation adds and scales, by which operands vary along an axis."""
    if name in ("add", "add_any", "sub"):
        return all(varies)
    if name == "mul":
        return sum(varies) < 2
    if name == "div":
        return not varies[-1]
    return name in LINEAR


def _transpose(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [pick(operands[0], equation.params["permutation"])]


def _squeeze(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    ndim = len(operands[0].axes)
    gone = {axis % ndim for axis in equation.params["dimensions"]}
    return [pick(operands[0], [axis for axis in range(ndim) if axis not in gone])]


def _broadcast(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """New axes, and those of size one that are repeated, are constant along theirs."""
    sizes = shape(equation.outvars[0])
    found = [(axes.new(size), True) for size in sizes]
    operand = operands[0]
    for axis, at in enumerate(equation.params["broadcast_dimensions"]):
        if shape(equation.invars[0])[axis] == sizes[at]:
            found[at] = operand.axes[axis], operand.uniform[axis]
    return [value([axis for axis, _ in found], [flag for _, flag in found])]


def _reshape(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Axes that stay, merge, or split by whole factors; all else is fixed."""
    old, new = shape(equation.invars[0]), shape(equation.outvars[0])
    operand = operands[0]
    if 0 in old or equation.params.get("dimensions") is not None:
        return fix_all(axes, equation, operands, "reshaped in another order")
    found: list[tuple[int, bool]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # The next block of axes with one product on both sides.
        first, start = i, j
        have = want = 1
        if i < len(old):
            have, i = old[i], i + 1
        if j < len(new):
            want, j = new[j], j + 1
        while have != want:
            if have < want:
                have, i = have * old[i], i + 1
            else:
                want, j = want * new[j], j + 1
        block, sizes = operand.axes[first:i], new[start:j]
        dealt = axes.deal(block, sizes)
        if dealt is None:
            reason = (
                f"reshaped from {old[first:i]} to {new[start:j]}, which does not keep "
                "whole factors"
            )
            for axis in block:
                axes.fix(axis, reason)
            dealt = list(fixed(axes, sizes, reason).axes)
        flag = all(operand.uniform[first:i])
        found += [(axis, flag) for axis in dealt]
    return [value(*zip(*found, strict=True))] if found else [value([])]


def _reduce(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    name = name_of(equation)
    gone = set(equation.params["axes"])
    operand = operands[0]
    for axis in gone:
        if name != "reduce_sum":
            axes.fix(operand.axes[axis], f"reduced by {name}")
        elif operand.uniform[axis]:
            axes.fix(operand.axes[axis], "counted: a sum of what is constant along it")
        else:
            axes.mark(operand.axes[axis], REDUCED)
    result = pick(operand, [a for a in range(len(operand.axes)) if a not in gone])
    if name != "reduce_sum":
        mark(axes, result, NONLINEAR)
    return [result]


def _along(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Sorts and running sums fix their axis and carry the others."""
    name = name_of(equation)
    ndim = len(operands[0].axes)
    axis = equation.params.get(_ALONG_AXIS[name], ndim - 1) % ndim
    for operand in operands:
        axes.fix(operand.axes[axis], f"{name} runs along it")
        for left, right in zip(operands[0].axes, operand.axes, strict=True):
            axes.unite(left, right)
        if name != "cumsum":
            mark(axes, operand, NONLINEAR)
    results = []
    for var in equation.outvars:
        own = list(operands[0].axes)
        if shape(var)[axis] != shape(equation.invars[0])[axis]:  # top_k
            own[axis] = fixed(axes, [shape(var)[axis]], f"the result of {name}").axes[0]
        results.append(value(own))
    return results


def _rev(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    for axis in equation.params["dimensions"]:
        axes.fix(operands[0].axes[axis], "reversed")
    return [operands[0]]


def _iota(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    sizes, counted = shape(equation.outvars[0]), equation.params["dimension"]
    found = [axes.new(size) for size in sizes]
    axes.fix(found[counted], "numbered by iota")
    return [value(found, [axis != counted for axis in range(len(sizes))])]


def _dense(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Free axes go on, batch axes unite, contracted ones end in both operands."""
    contracted, batched = equation.params["dimension_numbers"]
    left, right = operands
    for a, b in zip(*contracted, strict=True):
        axes.unite(left.axes[a], right.axes[b])
        if left.uniform[a] or right.uniform[b]:
            axes.mark(left.axes[a], REDUCED)
    for a, b in zip(*batched, strict=True):
        axes.unite(left.axes[a], right.axes[b])
    found = [left.axes[a] for a in batched[0]]
    uniform = [
        left.uniform[a] and right.uniform[b] for a, b in zip(*batched, strict=True)
    ]
    for side, operand in enumerate(operands):
        taken = {*contracted[side], *batched[side]}
        free = [axis for axis in range(len(operand.axes)) if axis not in taken]
        found += [operand.axes[axis] for axis in free]
        uniform += [operand.uniform[axis] for axis in free]
    return [value(found, uniform)]


def _convolution(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Channels as in a matrix product; depthwise ties them; positions are fixed."""
    params = equation.params
    x, kernel = operands
    lhs, rhs, out = params["dimension_numbers"]
    groups, channels = params["feature_group_count"], x.axes[lhs[1]]
    sizes = shape(equation.outvars[0])
    if params["batch_group_count"] != 1 or groups not in (1, axes.size(channels)):
        return fix_all(axes, equation, operands, "met by a grouped convolution")
    found = [UNIT] * len(sizes)
    found[out[0]] = x.axes[lhs[0]]
    found[out[1]] = kernel.axes[rhs[0]]
    if groups == 1:
        axes.unite(channels, kernel.axes[rhs[1]])
    else:
        pair = [groups, axes.size(kernel.axes[rhs[0]]) // groups]
        dealt = axes.deal([kernel.axes[rhs[0]]], pair)
        if dealt is None:
            return fix_all(axes, equation, operands, "met by a grouped convolution")
        axes.unite(channels, dealt[0])
        axes.mark(channels, NONLINEAR)
    for at, to in zip(lhs[2:], out[2:], strict=True):
        axes.fix(x.axes[at], "positions of a convolution")
        found[to] = fixed(axes, [sizes[to]], "positions of a convolution").axes[0]
    for at in rhs[2:]:
        axes.fix(kernel.axes[at], "taps of a convolution")
    return [value(found)]


def _window(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Pooling: positions are fixed, all that the window does not span goes on."""
    params, operand = equation.params, operands[0]
    if len([o for o in operands if o.axes]) > 1:
        return fix_all(axes, equation, operands, "met by reduce_window")
    found = []
    for index, axis in enumerate(operand.axes):
        steps = [
            params[name][index]
            for name in (
                *("window_dimensions", "window_strides"),
                *("base_dilation", "window_dilation"),
            )
            if name in params
        ]
        if set(steps) == {1} and tuple(params["padding"][index]) == (0, 0):
            found.append(axis)
            continue
        axes.fix(axis, "positions of a pooling window")
        size = shape(equation.outvars[0])[index]
        found += fixed(axes, [size], "positions of a pooling window").axes
    if name_of(equation) != "reduce_window_sum":
        mark(axes, value(found), NONLINEAR)
    return [value(found)]


def _concatenate(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    axis, first = equation.params["dimension"], operands[0]
    for operand in operands[1:]:
        for index, (left, right) in enumerate(
            zip(first.axes, operand.axes, strict=True)
        ):
            if index != axis:
                axes.unite(left, right)
    found = list(first.axes)
    found[axis] = axes.sum([operand.axes[axis] for operand in operands])
    flags = [all(f) for f in zip(*(o.uniform for o in operands), strict=True)]
    flags[axis] = False
    return [value(found, flags)]


def _split(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    axis, operand = equation.params["axis"], operands[0]
    dealt = axes.split(operand.axes[axis], [int(s) for s in equation.params["sizes"]])
    if dealt is None:
        return fix_all(axes, equation, operands, "split between its factors")
    return [with_axis(operand, axis, part) for part in dealt]


def _slice(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """A whole axis goes on; of a part, the axis is parts side by side."""
    params, result = equation.params, operands[0]
    strides = params["strides"] or (1,) * len(result.axes)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for index, (start, stop, stride) in enumerate(bounds):
        axis = result.axes[index]
        whole = axes.size(axis)
        if (start, stop, stride) == (0, whole, 1):
            continue
        dealt = None
        if stride == 1 and axes.reason(axis) is None:
            dealt = axes.split(axis, [start, stop - start, whole - stop])
        if dealt is None:
            axes.fix(axis, "sliced")
            dealt = [0, *fixed(axes, [-(-(stop - start) // stride)], "a slice").axes]
        result = with_axis(result, index, dealt[1])
    return [result]


def _dynamic_slice(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [_kept(axes, operands[0], shape(equation.outvars[0]), "sliced at an index")]


def _kept(axes: Axes, operand: Value, sizes: Sequence[int], reason: str) -> Value:
    """Axes that are whole go on, all others are fixed."""
    for index, (axis, size) in enumerate(zip(operand.axes, sizes, strict=True)):
        if axes.size(axis) != size:
            axes.fix(axis, reason)
            operand = with_axis(operand, index, fixed(axes, [size], reason).axes[0])
    return operand


def _dynamic_update(
    axes: Axes, equation: Any, operands: Sequence[Value]
) -> list[Value]:
    operand, update = operands[:2]
    for left, right in zip(operand.axes, update.axes, strict=True):
        if axes.size(left) == axes.size(right):
            axes.unite(left, right)
        else:
            axes.fix(left, "written in part")
            axes.fix(right, "written into a larger axis")
    flags = zip(operand.uniform, update.uniform, strict=True)
    return [Value(operand.axes, tuple(a and b for a, b in flags))]


def _gather(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Axes that are looked up whole go on, as the features of an embedding."""
    params, (operand, indices) = equation.params, operands
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    gone = {*numbers.collapsed_slice_dims, *batching}
    for index, axis in enumerate(operand.axes):
        if index in gone or sizes[index] != axes.size(axis):
            axes.fix(axis, "looked up by index (gather)")
    for axis in indices.axes:
        axes.fix(axis, "indices of a lookup")
    out = shape(equation.outvars[0])
    found = [axes.new(size) for size in out]
    rows = iter([axis for axis in range(len(operand.axes)) if axis not in gone])
    for at in range(len(out)):
        row = next(rows) if at in numbers.offset_dims else None
        if row is not None and out[at] == axes.size(operand.axes[row]):
            found[at] = operand.axes[row]
        else:
            axes.fix(found[at], "looked up by index (gather)")
    return [value(found)]


def _pad(axes: Axes, equation: Any, operands: Sequence[Value]) -> list[Value]:
    operand, sizes = operands[0], shape(equation.outvars[0])
    for index, config in enumerate(equation.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            axes.fix(operand.axes[index], "padded")
            padded = fixed(axes, [sizes[index]], "padded").axes[0]
            operand = with_axis(operand, index, padded)
    return [value(operand.axes)]


_RULES: dict[str, Rule] = {
    **DRAWS,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(_ALONG_AXIS, _along),
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "rev": _rev,
    "iota": _iota,
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "split": _split,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "pad": _pad,
}
