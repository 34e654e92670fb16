"""What the outputs lose with a width: measured, one group at a time.

A group that is cut can be written into kernels of the original size, whose rows for
what is dropped are zero. So the function itself runs on them, compiled once, and its
outputs say what the cut costs, whatever stands between.
"""

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

_EXAMPLES = 128
_WIDTHS = 5  # of a group that are tried; in between, the errors say the rest


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
    x = jax.tree.map(lambda leaf: leaf[:_EXAMPLES] if np.ndim(leaf) else leaf, batch)
    run, arrays = compiled(fn, params, x)
    whole = _floating(run(arrays))
    size = _squares(whole)
    if not size > 0:
        return False
    for one, curve in zip(spectra, curves, strict=True):
        if isinstance(one, Merged):
            continue  # copies go, and nothing is lost
        steps = np.linspace(0, len(curve.widths) - 1, _WIDTHS + 1)[:-1]
        tried = curve.widths[np.unique(steps.astype(int))]
        lost = []
        for width in tried[tried < one.group.size]:
            small = apply_cuts(structure, params, (_in_place(one.cut(int(width))),))
            found = _floating(run(array_leaves((small, x))))
            lost.append(_squares(map(jnp.subtract, found, whole)) / size)
        curve.losses = _filled_in(curve, tried, np.array(lost))
    return True


def _in_place(cut: Cut) -> Cut:
    """The same function on leaves of the original size."""
    size, encode = cut.group.size, cut.encode
    back = np.swapaxes(encode, -1, -2)
    # Sinks of a rotated group do all of it; else what is dropped is zero everywhere.
    kept = np.broadcast_to(np.eye(size), (*encode.shape[:-2], size, size))
    return Cut(
        cut.group,
        size,
        kept if cut.group.rotated else encode @ back,
        {sink: decode @ back for sink, decode in cut.decode.items()},
        cut.shifts,
    )


def _filled_in(curve: Curve, tried: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Losses at all widths: between those tried, their ratio to the errors runs on."""
    errors = np.array([curve.error(width) for width in curve.widths])
    if not len(lost):
        return errors
    tiny = 1e-12
    ratios = np.log(np.maximum(lost, tiny)) - [
        np.log(max(curve.error(width), tiny)) for width in tried[: len(lost)]
    ]
    found = errors * np.exp(np.interp(curve.widths, tried[: len(lost)], ratios))
    return np.minimum.accumulate(found)  # rounding aside, no width loses more


def _floating(outputs: Sequence[Any]) -> list[jax.Array]:
    return [one for one in outputs if jnp.issubdtype(one.dtype, jnp.inexact)]


def _squares(arrays: Any) -> float:
    return sum(float(jnp.sum(jnp.square(jnp.abs(one)))) for one in arrays)
