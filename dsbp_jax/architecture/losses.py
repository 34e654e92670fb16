"""What the outputs lose with a width or a rank: measured, one at a time.

A group that is cut can be written into kernels of the original size, whose rows for
what is dropped are zero. So the function itself runs on them, compiled once, and its
outputs say what the cut costs, whatever stands between. (Pairs that a nonlinearity
precedes are measured on the smaller model.)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture import examples
from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.compression import MASKED, compiled, resized
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
_TINY = 1e-12  # of the largest loss: nothing is lost; of an answer's variance, no error
_WORSE = 10.0  # times the largest loss: one that is not finite


class Outputs:
    """What a function answers on some examples, and what others lose of it.

    Args:
      fn: The function.
      params: Its parameters.
      batch: Arrays whose leading axis is the batch; some of its examples are taken.
      trials: How often `lost` will be asked.
    """

    def __init__(self, fn: Callable[..., Any], params: Any, batch: Any, trials: int):
        number = _PASSES * examples.count(batch) // max(trials, 1)
        trace_of = lambda batch: jax.eval_shape(lambda: array_leaves(fn(params, batch)))
        number = examples.at_once(trace_of, batch, min(max(number, _LEAST), _MOST))
        self._params, self._x = params, examples.some(batch, 0, number)
        self._run, arrays = compiled(fn, params, self._x)
        self._answers = _floating(self._run(arrays))
        self._size = sum(_variance(one, number) for one in self._answers)

    @property
    def known(self) -> bool:
        """Whether something can be lost: some output is floating, and not all alike."""
        return 0 < self._size < np.inf

    def lost(self, params: Any) -> float:
        """What is lost with other numbers in the leaves, as a share of the variance."""
        placed = _placed(params, self._params)
        return self._share(self._run(array_leaves((placed, self._x))))

    def lost_by(self, fn: Callable[..., Any], params: Any) -> float:
        """What another function loses, with its own leaves."""
        run, arrays = compiled(fn, params, self._x)
        return self._share(run(arrays))

    def _share(self, found: Sequence[Any]) -> float:
        return sum(map(_change, _floating(found), self._answers)) / self._size


def tried(curve: Curve) -> list[int]:
    """Some of the widths that there may be, the least among them, but the whole.

    None of the widest: matrices would be formed that are too large.
    """
    if curve.size > MAX_DENSE:
        return []
    count = _WIDTHS if curve.size <= _WIDE else _WIDTHS_WIDE
    steps = np.linspace(0, len(curve.widths) - 1, count + 1)[:-1]
    widths = curve.widths[np.unique(steps.astype(int))]
    return [int(width) for width in widths if width < curve.size]


def set_losses(
    curves: Sequence[Curve], widths: Sequence[Sequence[int]], lost: Sequence[Any]
) -> bool:
    """Puts what was measured into the curves.

    Between the widths that were tried the ratio of loss to error is interpolated, in
    logarithms; where none was, or none lost anything, it is that of the others in the
    mean.

    Args:
      curves: The curves; `losses` of each is set.
      widths: Of each curve, those that were tried.
      lost: What each of these lost.

    Returns:
      Whether anything was measured; else nothing is set.
    """
    found = np.array([number for own in lost for number in own])
    finite = found[np.isfinite(found)]
    if not len(finite):
        return False
    most = float(np.max(finite))
    floor = _TINY * most + 1e-300
    measured, ratios = [], []
    for own, curve, at in zip(lost, curves, widths, strict=True):
        # What is not finite is worse than all else; a narrower width that loses less
        # than a wider one does so by chance.
        known = np.where(np.isfinite(own), own, _WORSE * most + floor)
        known = np.maximum.accumulate(np.maximum(known, floor)[::-1])[::-1]
        errors = np.maximum([curve.error(width) for width in at], _TINY)
        measured.append(known)
        ratios.append(np.log(known) - np.log(errors))
    # Of what loses nothing the examples may not have reached any.
    reached = [
        own for own, known in zip(ratios, measured, strict=True) if any(known > floor)
    ]
    others = float(np.mean(np.concatenate(reached))) if reached else 0.0
    for curve, at, known, own in zip(curves, widths, measured, ratios, strict=True):
        errors = np.array([curve.error(width) for width in curve.widths])
        if any(known > floor):
            between = errors * np.exp(np.interp(curve.widths, at, own))
            narrower = np.searchsorted(at, curve.widths, side="right") - 1
            curve.losses = np.minimum(between, known[narrower])
        else:
            curve.losses = errors * np.exp(others)
        curve.losses = np.maximum.accumulate(curve.losses[::-1])[::-1]
    return True


def measure_groups(
    fn: Callable[..., Any],
    params: Any,
    structure: AxisTrace,
    spectra: Sequence[Measured | Merged],
    curves: Sequence[Curve],
    batch: Any,
) -> bool:
    """Puts into each curve what the outputs lose, as a share of their variance.

    Args:
      fn: The function.
      params: Its parameters.
      structure: The function, traced.
      spectra: The groups.
      curves: Theirs; `losses` of each is set.
      batch: Arrays whose leading axis is the batch.

    Returns:
      Whether that can be said.
    """
    both = zip(spectra, curves, strict=True)
    pairs = [(one, curve) for one, curve in both if isinstance(one, Measured)]
    own = [curve for _, curve in pairs]  # copies go, and nothing is lost
    widths = [tried(curve) for curve in own]
    outputs = Outputs(fn, params, batch, sum(map(len, widths)))
    if not outputs.known:
        return False

    def lost(cut: Cut) -> float:
        if _is_in_place(structure, cut):
            whole = _in_place(structure, cut)
            return outputs.lost(apply_cuts(structure, params, (whole,)))
        small = apply_cuts(structure, params, (cut,))
        return outputs.lost_by(resized(fn, params, (cut,)), small)

    return set_losses(
        own,
        widths,
        [
            [lost(one.cut(width)) for width in at]
            for (one, _), at in zip(pairs, widths, strict=True)
        ],
    )


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
    """Squares of how far examples are from the first, over 2."""
    shared = number == 1 or output.ndim == 0 or output.shape[0] != number
    first = jnp.zeros_like(output) if shared else output[:1]
    away = jnp.where(_counts(output) & _counts(first), output - first, 0)
    return float(jnp.sum(away**2)) / (1 if shared else 2)


def _change(new: jax.Array, old: jax.Array) -> float:
    """The sum of squares of what changed."""
    return float(jnp.sum(jnp.where(_counts(old), new - old, 0) ** 2))


def _counts(output: jax.Array) -> jax.Array:
    """Where an output says something: it is finite, and no mask."""
    return jnp.abs(output) < MASKED
