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

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.compression import compiled
from dsbp_jax.architecture.cuts import Cut, apply_cuts
from dsbp_jax.architecture.measured import Measured
from dsbp_jax.architecture.merging import Merged
from dsbp_jax.architecture.widths import Curve
from dsbp_jax.layers import array_leaves

# Widths of a group that are tried; in between, the errors say the rest.
_WIDTHS, _WIDTHS_WIDE, _WIDE = 5, 3, 512  # of wider groups fewer: repairs are cubic
_LEAST, _MOST = 4, 128  # examples that are looked at, as many as take together
_TINY = 1e-12
_PASSES = 16  # the time of so many passes of the first batch


def measure_losses(
    fn: Callable[..., Any],
    params: Any,
    structure: AxisTrace,
    spectra: Sequence[Measured | Merged],
    curves: Sequence[Curve],
    batch: Any,
) -> bool:
    """Puts into each curve what the outputs lose, as a share of their mean square.

    Args:
      fn: The function.
      params: Its parameters.
      structure: The function, traced.
      spectra: The groups.
      curves: Theirs; `losses` of each is set.
      batch: Arrays whose leading axis is the batch; some of its examples are taken.

    Returns:
      Whether that can be said: no output is floating, or all are zero, where not.
    """
    tried = [
        _tried(curve) if isinstance(one, Measured) else []  # copies go, nothing is lost
        for one, curve in zip(spectra, curves, strict=True)
    ]
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
    count = _PASSES * min(sizes, default=1) // max(sum(map(len, tried)), 1)
    count = min(max(count, _LEAST), _MOST)
    x = jax.tree.map(lambda leaf: leaf[:count] if np.ndim(leaf) else leaf, batch)
    run, arrays = compiled(fn, params, x)
    whole = _floating(run(arrays))
    size = _squares(whole)
    if not size > 0:
        return False
    for one, curve, widths in zip(spectra, curves, tried, strict=True):
        lost = []
        for width in widths:
            assert isinstance(one, Measured)
            small = apply_cuts(
                structure, params, (_in_place(structure, one.cut(width)),)
            )
            found = _floating(run(array_leaves((small, x))))
            lost.append(_squares(map(jnp.subtract, found, whole)) / size)
        if widths:
            curve.losses = _filled_in(curve, widths, lost)
    return True


def _tried(curve: Curve) -> list[int]:
    """Some of the widths that a group may have, the least among them, but the whole."""
    count = _WIDTHS if curve.size <= _WIDE else _WIDTHS_WIDE
    steps = np.linspace(0, len(curve.widths) - 1, count + 1)[:-1]
    widths = curve.widths[np.unique(steps.astype(int))]
    return [int(width) for width in widths if width < curve.size]


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
    mask = np.eye(size) * cut.encode.sum(axis=-1)[..., None]
    if group.sinks and len(group.repaired) == len(group.sinks):
        taken = {
            (site.path, axis)
            for site in structure.traced.sites
            if site.name in group.sinks
            for axis in site.view.input_axes
        }
        places = tuple(p for p in group.places if (p.path, p.axis) in taken)
        group = dataclasses.replace(group, places=places)
    return Cut(group, size, mask, decode, cut.shifts)


def _filled_in(curve: Curve, tried: Sequence[int], lost: Sequence[float]) -> np.ndarray:
    """Losses at all widths: between those tried, their ratio to the errors runs on."""
    errors = np.array([curve.error(width) for width in curve.widths])
    known = [curve.error(width) for width in tried]
    ratios = np.log(np.maximum(lost, _TINY)) - np.log(np.maximum(known, _TINY))
    found = errors * np.exp(np.interp(curve.widths, tried, ratios))
    return np.minimum.accumulate(found)  # rounding aside, no width loses more


def _floating(outputs: Sequence[Any]) -> list[jax.Array]:
    return [one for one in outputs if jnp.issubdtype(one.dtype, jnp.inexact)]


def _squares(arrays: Any) -> float:
    return sum(float(jnp.sum(jnp.square(jnp.abs(one)))) for one in arrays)
