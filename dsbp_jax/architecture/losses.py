"""What the outputs lose with a width: measured, one group at a time.

A group that is cut can be written into kernels of the original size, whose rows for
what is dropped are zero. So the function itself runs on them, compiled once, and its
outputs say what the cut costs, whatever stands between.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture import examples
from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.compression import compiled, resized
from dsbp_jax.architecture.cuts import Cut, apply_cuts
from dsbp_jax.architecture.groups import atom_of
from dsbp_jax.architecture.measured import Measured
from dsbp_jax.architecture.merging import Merged
from dsbp_jax.architecture.moments import MAX_DENSE
from dsbp_jax.architecture.values import NONLINEAR
from dsbp_jax.architecture.widths import Curve
from dsbp_jax.layers import array_leaves

# Widths of a group that are tried; in between, the errors say the rest.
_WIDTHS, _WIDTHS_WIDE, _WIDE = 5, 3, 512  # of wider groups fewer: repairs are cubic
_LEAST, _MOST = 4, 128  # examples that are looked at
_PASSES = 16  # within these bounds, so many passes of the first batch
_TINY = 1e-12  # share of the largest loss that is none


def measure_losses(
    fn: Callable[..., Any],
    params: Any,
    trace_of: Callable[[Any], AxisTrace],
    structure: AxisTrace,
    spectra: Sequence[Measured | Merged],
    curves: Sequence[Curve],
    batch: Any,
) -> bool:
    """Puts into each curve what the outputs lose, as a share of their variance.

    Args:
      fn: The function.
      params: Its parameters.
      trace_of: Traces it on a batch.
      structure: The function, traced.
      spectra: The groups.
      curves: Theirs; `losses` of each is set.
      batch: Arrays whose leading axis is the batch; some of its examples are taken.

    Returns:
      Whether that can be said: no output is floating, or all are alike, where not.
    """
    tried = [_tried(one, curve) for one, curve in zip(spectra, curves, strict=True)]
    whole = examples.count(batch)
    number = _PASSES * whole // max(sum(map(len, tried)), 1)
    number = examples.at_once(trace_of, batch, min(max(number, _LEAST), _MOST))
    x = examples.some(batch, 0, number)
    run, arrays = compiled(fn, params, x)
    outputs = _floating(run(arrays))
    size = sum(_variance(one, number) for one in outputs)
    if not 0 < size < np.inf:
        return False
    measured = []
    for one, widths in zip(spectra, tried, strict=True):
        lost = []
        for width in widths:
            assert isinstance(one, Measured)
            cut = one.cut(width)
            if _is_in_place(structure, cut):
                small = apply_cuts(structure, params, (_in_place(structure, cut),))
                found = run(array_leaves((_placed(small, params), x)))
            else:
                small = apply_cuts(structure, params, (cut,))
                shorter, arrays = compiled(resized(fn, params, (cut,)), small, x)
                found = shorter(arrays)
            changes = map(_change, _floating(found), outputs)
            lost.append(sum(changes) / size)
        measured.append(np.array(lost))
    found = np.concatenate(measured)
    if not np.isfinite(found).all():
        return False
    floor = _TINY * float(np.max(found, initial=0)) + 1e-300
    ratios = [
        np.log(np.maximum(lost, floor))
        - np.log(np.maximum([curve.error(width) for width in widths], _TINY))
        for lost, curve, widths in zip(measured, curves, tried, strict=True)
    ]
    others = float(np.mean(np.concatenate(ratios))) if len(found) else 0.0
    for one, curve, widths, own in zip(spectra, curves, tried, ratios, strict=True):
        if isinstance(one, Measured):
            errors = np.array([curve.error(width) for width in curve.widths])
            between = np.interp(curve.widths, widths, own) if widths else others
            losses = errors * np.exp(between)
            # A narrower one may lose less by chance, which is nothing to count on.
            curve.losses = np.maximum.accumulate(losses[::-1])[::-1]
    return True


def _tried(one: Measured | Merged, curve: Curve) -> list[int]:
    """Some of the widths that a group may have, the least among them, but the whole.

    None where copies go, which loses nothing, and none of the widest, whose kernels
    would be multiplied by matrices that are too large.
    """
    if isinstance(one, Merged) or curve.size > MAX_DENSE:
        return []
    count = _WIDTHS if curve.size <= _WIDE else _WIDTHS_WIDE
    steps = np.linspace(0, len(curve.widths) - 1, count + 1)[:-1]
    widths = curve.widths[np.unique(steps.astype(int))]
    return [int(width) for width in widths if width < curve.size]


def _is_in_place(structure: AxisTrace, cut: Cut) -> bool:
    """Whether zeros in the kernels stand for what is dropped.

    Not where two activations contract it past a nonlinearity that need not keep zeros.
    """
    marks = structure.axes.marks(atom_of(structure, cut.group))
    return not cut.group.pairs or NONLINEAR not in marks


def _in_place(structure: AxisTrace, cut: Cut) -> Cut:
    """The same function on leaves of the original size.

    Layers that are repaired have rows of zeros for what is dropped, so it does not
    matter what comes in there; where others contract it, it is zero everywhere.
    """
    group, (*beside, size, _) = cut.group, cut.encode.shape
    decode = {}
    for sink, matrix in cut.decode.items():
        if group.rotated:
            decode[sink] = matrix @ np.swapaxes(cut.encode, -1, -2)
        else:
            kept = np.argmax(cut.encode, axis=-2)[..., None, :]
            decode[sink] = np.zeros((*beside, size, size))
            np.put_along_axis(decode[sink], kept, matrix, axis=-1)
    if group.sinks and len(group.repaired) == len(group.sinks):
        taken = {
            (site.path, axis)
            for site in structure.traced.sites
            if site.name in group.sinks
            for axis in site.view.input_axes
        }
        places = tuple(p for p in group.places if (p.path, p.axis) in taken)
        group, mask = dataclasses.replace(group, places=places), cut.encode
    else:
        mask = np.eye(size) * cut.encode.sum(axis=-1)[..., None]
    return Cut(group, size, mask, decode, cut.shifts)


def _placed(small: Any, params: Any) -> Any:
    """The new leaves where the old ones are, so that nothing is compiled again."""

    def place(new: Any, old: Any) -> Any:
        same = new is old or not isinstance(old, jax.Array)
        return new if same or not old.committed else jax.device_put(new, old.sharding)

    return jax.tree.map(place, small, params)


def _floating(outputs: Sequence[Any]) -> list[jax.Array]:
    """Those in which something can be lost, in single precision at least."""
    return [
        one.astype(jnp.float32) if one.dtype.itemsize < 4 else one
        for one in outputs
        if jnp.issubdtype(one.dtype, jnp.floating)
    ]


def _variance(output: jax.Array, number: int) -> float:
    """Squares of how far examples are from the first; of what is finite."""
    shared = number == 1 or output.ndim == 0 or output.shape[0] != number
    away = output if shared else (output - output[:1]) / 2**0.5
    return float(jnp.sum(jnp.where(jnp.isfinite(away), away, 0) ** 2))


def _change(new: jax.Array, old: jax.Array) -> float:
    """The sum of squares of what changed; of what was finite."""
    return float(jnp.sum(jnp.where(jnp.isfinite(old), new - old, 0) ** 2))
