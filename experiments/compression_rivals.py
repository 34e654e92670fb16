"""What others cut: neurons by their weights or by chance, and kernels by their SVD.

All run in the harness of `dsbp_jax.architecture`: the same groups, the same evaluation
on smaller leaves, equal FLOPs. None looks at activations, and none repairs; but
`unrepaired`, which has our choice, to tell it from the repair, and `factors`, which is
`architecture.factorize`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsbp_jax import architecture
from dsbp_jax.architecture.axis_walk import trace_axes
from dsbp_jax.architecture.cuts import Cut, apply_cuts, sizes_of
from dsbp_jax.architecture.factorization import (
    Split,
    factored,
    ranked,
    separable,
    share_kept,
)
from dsbp_jax.architecture.groups import Group, groups_of
from dsbp_jax.architecture.moments import Moments
from dsbp_jax.architecture.widths import Curve, share_out
from dsbp_jax.layers import leaves_by_path, map_paths

Function = Callable[[Any, Any], Any]
_HALVINGS = 40


class Smaller(NamedTuple):
    """A model on smaller leaves.

    Attributes:
      resized: From a function of the original's leaves to one of the smaller.
      arrays: The smaller leaves, in a tree that begins like the original's.
      flops: Their share of the original's.
    """

    resized: Callable[[Function], Function]
    arrays: Any
    flops: float


def _smaller(
    params: Any, structure: Any, cuts: tuple[Cut, ...], share: float
) -> Smaller:
    """These cuts, carried out."""
    run = lambda fn: architecture.resized(fn, params, cuts)
    return Smaller(run, apply_cuts(structure, params, cuts), share)


def _cut(params: Any, structure: Any, kept: Sequence[Any]) -> Smaller:
    """The model with these neurons of each group, nothing repaired."""
    cuts = []
    for group, neurons in kept:
        encode = np.zeros((math.prod(group.entries), group.size, neurons.shape[-1]))
        for entry, own in enumerate(neurons):
            encode[entry, np.sort(own), np.arange(len(own))] = 1
        encode = encode.reshape(*group.entries, *encode.shape[1:])
        cuts.append(Cut(group, neurons.shape[-1], encode, {}, {}))
    chosen = tuple(cuts)
    share = structure.flops(sizes_of(structure, chosen)) / structure.flops({})
    return _smaller(params, structure, chosen, share)


def _norms(structure: Any, group: Group, params: Any) -> np.ndarray:
    """Mean size of the weights that make each neuron, shape `(entries, n)`."""
    leaves = leaves_by_path(params)
    makers = [
        site
        for site in structure.traced.sites
        if any(
            p.path == site.path and p.axis in site.view.output_axes
            for p in group.places
        )
    ]
    total = np.zeros((*group.entries, group.size))
    for site in makers:
        (place,) = (p for p in group.places if p.path == site.path)
        leaf = np.abs(np.asarray(leaves[site.path]))
        sides = *site.view.batch_axes, *site.view.output_axes
        beside = [axis for axis in sides if axis != place.axis] if group.entries else []
        kept = [*beside, place.axis]
        if tuple(leaf.shape[axis] for axis in kept) != total.shape:
            raise ValueError(
                f"rivals cut widths that are whole axes of a leaf, not {group.name!r}"
            )
        others = tuple(axis for axis in range(leaf.ndim) if axis not in kept)
        found = leaf.mean(axis=others, keepdims=True)
        total += np.moveaxis(found, kept, range(len(kept))).reshape(total.shape)
    return total.reshape(-1, group.size)


def _by_scores(
    fn: Any,
    params: Any,
    batches: Sequence[Any],
    share: float,
    multiple_of: int,
    scores: Callable[[Any, Group], np.ndarray],
    *,
    across: bool,
) -> Smaller:
    """The neurons of the highest scores, at that share of the FLOPs.

    Args:
      fn: The model.
      params: Its parameters.
      batches: Its inputs.
      share: Of the FLOPs.
      multiple_of: Of which widths are multiples.
      scores: Of a group's neurons.
      across: Whether scores of all groups are compared; else all widths shrink alike.
    """
    structure = trace_axes(fn, params, (batches[0],))
    # A width that LayerNorm sums over is not cut, by us neither: its mean would change.
    groups = [
        group
        for group in groups_of(structure).groups
        if not group.reason and not group.merged
    ]
    found = [scores(structure, group) for group in groups]
    ranked = [np.argsort(-own, axis=-1, kind="stable") for own in found]
    relative = [own / max(own.mean(), 1e-30) for own in found]

    def widths(dial: float) -> list[int]:
        chosen = []
        for group, own in zip(groups, relative, strict=True):
            above = np.mean(np.sum(own > dial, axis=-1))
            wanted = above if across else (1 - dial) * group.size
            steps = max(1, round(float(wanted) / multiple_of))
            chosen.append(min(group.size, steps * multiple_of))
        return chosen

    def kept(dial: float) -> list[Any]:
        return [
            (group, order[:, :width])
            for group, order, width in zip(groups, ranked, widths(dial), strict=True)
        ]

    def flops(dial: float) -> float:
        places = [Cut(g, o.shape[-1], o, {}, {}) for g, o in kept(dial)]
        return structure.flops(sizes_of(structure, tuple(places))) / structure.flops({})

    low, high = 0.0, float(max(own.max() for own in relative)) if across else 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if flops(middle) <= share else (middle, high)
    return _cut(params, structure, kept(high))


def _l1(fn, params, batches, share, multiple_of, seed) -> Smaller:
    del seed
    scores = lambda structure, group: _norms(structure, group, params)
    return _by_scores(fn, params, batches, share, multiple_of, scores, across=False)


def _magnitude(fn, params, batches, share, multiple_of, seed) -> Smaller:
    del seed
    scores = lambda structure, group: _norms(structure, group, params)
    return _by_scores(fn, params, batches, share, multiple_of, scores, across=True)


def _random(fn, params, batches, share, multiple_of, seed) -> Smaller:
    rng = np.random.default_rng(seed)
    scores = lambda _, group: rng.random((math.prod(group.entries), group.size))
    return _by_scores(fn, params, batches, share, multiple_of, scores, across=False)


def _unrepaired(fn, params, batches, share, multiple_of, seed) -> Smaller:
    """Our neurons and widths, with the next kernels as they were."""
    del seed
    plan = architecture.plan(fn, params, batches, flops=share, multiple_of=multiple_of)
    bare = tuple(Cut(c.group, c.width, c.encode, {}, {}) for c in plan.cuts)
    return _smaller(params, plan.structure, bare, plan.flops)


def _factors(fn, params, batches, share, multiple_of, seed) -> Smaller:
    """Kernels split by what their layers see, as `architecture.factorize` does."""
    del multiple_of, seed
    structure = trace_axes(fn, params, (batches[0],))
    return _split(fn, params, structure, *ranked(fn, params, batches, None, share))


def _svd(fn, params, batches, share, multiple_of, seed) -> Smaller:
    """Each kernel by its own SVD, ranks shared out by what is left of its norm."""
    del multiple_of, seed
    structure = trace_axes(fn, params, (batches[0],))
    leaves = leaves_by_path(params)
    splits = []
    for site in separable(structure.traced):
        *stack, _, d_in, _ = site.view.matrix_shape(site.shape)
        white = Moments(math.prod(stack), d_in)
        white.add(np.sqrt(d_in) * np.stack([np.eye(d_in)] * math.prod(stack)))
        splits.append(Split(site, leaves[site.path], white))
    cost = functools.partial(share_kept, structure.flops({}), splits)
    ranks = share_out([Curve(s.errors, s.full, 1) for s in splits], cost, share)
    return _split(fn, params, structure, splits, ranks)


def _split(
    fn: Function,
    params: Any,
    structure: Any,
    splits: Sequence[Split],
    ranks: Sequence[int],
) -> Smaller:
    """Kernels with these ranks."""
    _, small = factored(fn, params, splits, ranks)
    # Factors take the places of their kernels, to be trained where these were.
    factors = small["factors"]
    arrays = map_paths(lambda path, leaf: factors.get(path, leaf), params)
    paths, treedef = list(leaves_by_path(params)), jax.tree.structure(params)

    def resized(other: Function) -> Function:
        run, _ = factored(other, params, splits, ranks)

        def apply(arrays: Any, x: Any) -> Any:
            parts = dict(zip(paths, treedef.flatten_up_to(arrays), strict=True))
            whole = [None if path in factors else parts[path] for path in paths]
            kept = jax.tree.unflatten(treedef, whole)
            found = {path: parts[path] for path in factors}
            return run({"params": kept, "factors": found}, x)

        return apply

    share = share_kept(structure.flops({}), splits, ranks)
    return Smaller(resized, arrays, share)


Rival = Callable[[Any, Any, Sequence[jax.Array], float, int, int], Smaller]
RIVALS: dict[str, Rival] = {
    "unrepaired": _unrepaired,
    "l1": _l1,
    "magnitude": _magnitude,
    "random": _random,
    "factors": _factors,
    "svd": _svd,
}
