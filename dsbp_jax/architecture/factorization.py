"""Kernels as two thin factors, by what the layers see: for what has no width to cut.

For inputs h of second moments C and a kernel W, the best AB of rank r is that of the
leading singular triplets of C^½W: `hAB` is then nearest to `hW` in the mean.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import trace_axes
from dsbp_jax.architecture.losses import Outputs, set_losses, tried
from dsbp_jax.architecture.moments import Moments
from dsbp_jax.architecture.selection import width_of_energy
from dsbp_jax.architecture.widths import Curve, share_out
from dsbp_jax.checks import in_unit_interval
from dsbp_jax.layers import (
    Product,
    Site,
    Trace,
    array_leaves,
    collect_rows,
    evaluate,
    gather_rows,
    leaves_by_path,
    map_paths,
    trace,
)

_ROWS = 4096  # of one batch and layer, at most
_EXACT = 1e-11


def factorize(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    energy: float | None = None,
    flops: float | None = None,
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Splits kernels `W ≈ AB` where that saves operations.

    Each kernel that is nothing but the weight of one layer is a candidate, of any
    layout, in a scanned stack as well; of a convolution A is a convolution of one tap.

    Args:
      fn: A function `fn(params, x)`.
      params: Its parameters.
      batches: An iterable of x, at least one.
      energy: In (0, 1]: each kernel has the least rank with which at most `1 − energy`
        of the mean square of its answers is lost, where that saves operations.
      flops: In (0, 1]: the share of the operations of all products that is kept; ranks
        are shared out as `plan` shares out widths.

    Returns:
      A function and its parameters: a dict of `params`, the tree with None for each
      kernel that was split, and `factors`, by path `{"a": A, "b": B}` of shapes
      `(*batch, d_in, r)` and `(*batch, window, r, d_out)`. `params` is untouched.

    Raises:
      ValueError: Not exactly one of `energy` and `flops` is given, or it is outside of
        (0, 1]; no ranks reach it; no kernel is saved anything; `batches` is empty.

    References:
      [O] METHODS section 10. By activations: [P] Sakr and Khailany, ESPACE, NeurIPS
      2024.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> low = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 12))
      >>> fn = lambda params, x: x @ params["w"]
      >>> x = jnp.asarray(rng.normal(size=(50, 12)), jnp.float32)
      >>> params = {"w": jnp.asarray(low, jnp.float32)}
      >>> thin, small = factorize(fn, params, [x], energy=1.0)
      >>> small["factors"]["w"]["a"].shape
      (12, 2)
      >>> bool(jnp.allclose(thin(small, x), fn(params, x), atol=1e-4))
      True
    """
    return factored(fn, params, *ranked(fn, params, batches, energy, flops))


def ranked(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    energy: float | None,
    flops: float | None,
) -> tuple[list["Split"], list[int]]:
    """The kernels that can be split, and a rank for each; arguments as `factorize`."""
    given = {
        name: goal
        for name, goal in (("energy", energy), ("flops", flops))
        if goal is not None
    }
    if len(given) != 1:
        named = ", ".join(given) or "none"
        raise ValueError(f"exactly one of energy and flops must be given, got {named}")
    ((name, goal),) = given.items()
    goal = float(in_unit_interval(name, goal, open_left=True))
    stream = iter(batches)
    try:
        sample = next(stream)
    except StopIteration:
        raise ValueError("batches must hold at least one batch, got none") from None
    structure = trace_axes(fn, params, (sample,))
    sites = separable(structure.traced)
    moments = _moments(
        fn, params, itertools.chain([sample], stream), structure.traced, sites
    )
    leaves = leaves_by_path(params)
    splits = [Split(site, leaves[site.path], moments[site.name]) for site in sites]
    whole = structure.flops({})
    if energy is not None:
        ranks = [width_of_energy(s.errors, energy, exact=True) for s in splits]
    else:
        costs = functools.partial(share_kept, whole, splits)
        curves = [Curve(split.errors, split.full, 1) for split in splits]
        _measure(fn, params, splits, curves, sample)
        ranks = share_out(curves, costs, goal)
    if not any(split.saved(max(1, r)) for split, r in zip(splits, ranks, strict=True)):
        raise ValueError(
            f"{name}={goal:g} saves no operations: none of the {len(splits)} kernels "
            "that can be split has a rank that is low enough"
        )
    return splits, ranks


def share_kept(whole: float, splits: Sequence["Split"], ranks: Sequence[int]) -> float:
    """The share of the whole function's operations that is left with these ranks."""
    saved = sum(split.saved(rank) for split, rank in zip(splits, ranks, strict=True))
    return 1 - saved / max(whole, 1)


def _measure(
    fn: Callable[..., Any],
    params: Any,
    splits: Sequence["Split"],
    curves: Sequence[Curve],
    batch: Any,
) -> None:
    """Puts into each curve what the outputs lose with a rank, if that can be said."""
    ranks = [tried(curve) for curve in curves]
    outputs = Outputs(fn, params, batch, sum(map(len, ranks)))
    if not outputs.known:
        return

    def lost(split: Split, rank: int) -> float:
        new = {split.site.path: split.product(rank)}
        return outputs.lost(map_paths(lambda path, leaf: new.get(path, leaf), params))

    both = zip(splits, ranks, strict=True)
    set_losses(curves, ranks, [[lost(one, rank) for rank in at] for one, at in both])


def factored(
    fn: Callable[..., Any],
    params: Any,
    splits: Sequence["Split"],
    ranks: Sequence[int],
) -> tuple[Callable[[Any, Any], Any], Any]:
    """The function and its parameters with kernels of these ranks, where that saves."""
    chosen = {
        split.site.path: split.factors(max(1, rank))
        for split, rank in zip(splits, ranks, strict=True)
        if split.saved(max(1, rank)) > 0
    }
    kept = map_paths(lambda path, leaf: None if path in chosen else leaf, params)
    return _run(fn, params, chosen), {"params": kept, "factors": chosen}


def _run(
    fn: Callable[..., Any], params: Any, chosen: Mapping[str, Any]
) -> Callable[[Any, Any], Any]:
    """The function, on factors."""
    treedef = jax.tree.structure(params)
    types = [
        (path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if path in chosen else None)
        for path, leaf in leaves_by_path(params).items()
    ]

    def apply(small: Any, x: Any) -> Any:
        rest = iter(jax.tree.leaves(small["params"]))
        leaves = [
            jnp.zeros(struct.shape, struct.dtype) if struct is not None else next(rest)
            for _, struct in types
        ]
        whole = jax.tree.unflatten(treedef, leaves)
        traced = trace(fn, whole, (x,), {})
        sites = [site for site in traced.sites if site.path in chosen]
        extras = {site.name: small["factors"][site.path] for site in sites}

        def visit(product: Product, x: jax.Array, w: jax.Array, extra: Any) -> Any:
            thin = product.operand(extra["b"].astype(w.dtype))
            return product.expand(product.compress(x, extra["a"]), thin), None

        outputs, _ = evaluate(
            traced, visit, array_leaves((whole, x)), extras, sites=sites
        )
        return traced.unflatten(outputs)

    return apply


def separable(traced: Trace) -> list[Site]:
    """The layers whose kernel can be split."""
    return [site for site in traced.sites if _alone(traced, site)]


def _alone(traced: Trace, site: Site) -> bool:
    """Whether a kernel is the weight of one layer and nothing else."""
    others = [other for other in traced.sites if other.path == site.path]
    used = any(use.path == site.path for use in traced.uses)
    return len(others) == 1 and not used and site.rule is None and not site.fused


def _moments(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    traced: Trace,
    sites: Sequence[Site],
) -> dict[str, Moments]:
    """What the layers see."""
    found: dict[str, Moments] = {}
    programs: dict[Any, Any] = {}
    for batch in batches:
        arrays = array_leaves((params, batch))
        key = jax.tree.structure(batch), tuple((a.shape, a.dtype) for a in arrays)
        if key not in programs:
            own = traced if not programs else trace(fn, params, (batch,), {})
            programs[key] = jax.jit(lambda arrays, own=own: _inputs(own, sites, arrays))
        seen = programs[key](arrays)
        for site in sites:
            rows = np.asarray(seen[site.name])
            rows = rows.reshape(-1, *rows.shape[-2:])
            if site.name not in found:
                found[site.name] = Moments(len(rows), rows.shape[-1])
            found[site.name].add(rows)
    return found


def _inputs(
    traced: Trace, sites: Sequence[Site], arrays: Sequence[Any]
) -> dict[str, jax.Array]:
    names = {site.name for site in sites}
    own = [site for site in traced.sites if site.name in names]

    def visit(product: Product, x: jax.Array, w: jax.Array, extra: Any) -> Any:
        rows = collect_rows(product.site, x, None, ("inputs",), _ROWS)
        return product(x, w), rows

    _, collected = evaluate(traced, visit, arrays, sites=own)
    found = {}
    for site in own:
        inputs = gather_rows(site, collected[site.name], ("inputs",), _ROWS).inputs
        assert inputs is not None
        found[site.name] = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    return found


class Split:
    """One kernel, and what each rank would lose and save."""

    def __init__(self, site: Site, leaf: Any, moments: Moments):
        self.site, self.dtype = site, leaf.dtype
        matrix = np.asarray(site.view.to_matrix(jnp.asarray(leaf))).astype(np.float64)
        self.batch = matrix.shape[:-3]
        matrix = matrix.reshape(-1, *matrix.shape[-3:])
        _, self.window, d_in, self.d_out = matrix.shape
        factor = moments.factor(False)
        self.parts, errors, totals = [], [], []
        for entry, kernel in enumerate(matrix):
            wide = np.swapaxes(kernel, 0, 1).reshape(d_in, -1)
            basis, values = factor.eigen(entry)
            seen = values > _EXACT * max(values[0], 1e-300)
            basis, scale = basis[:, seen], np.sqrt(values[seen])
            left, strengths, right = np.linalg.svd(
                scale[:, None] * (basis.T @ wide), full_matrices=False
            )
            self.parts.append((basis @ (left / scale[:, None]), strengths, right))
            energies = strengths**2
            total = energies.sum()
            lost = total - np.concatenate([[0.0], np.cumsum(energies)])
            errors.append(np.where(lost > _EXACT * total, lost, 0) / max(total, 1e-300))
            totals.append(total)
        longest = max(map(len, errors))
        padded = [np.pad(error, (0, longest - len(error))) for error in errors]
        weights = np.array(totals) / max(sum(totals), 1e-300)
        self.errors = np.tensordot(weights, np.array(padded), axes=1)
        self.full = min(d_in, self.window * self.d_out)
        self.d_in = d_in

    def saved(self, rank: int) -> int:
        """Operations that a rank saves; none where the kernel stays whole."""
        site = self.site
        times = math.prod(site.lengths) * math.prod(
            digit.size for _, digits in site.inputs.batch for digit in digits
        )
        rows_in, rows = site.inputs.num_rows, site.outputs.num_rows
        whole = rows * self.window * self.d_in * self.d_out
        thin = rows_in * self.d_in * rank + rows * self.window * rank * self.d_out
        return 2 * times * max(whole - thin, 0)

    def product(self, rank: int) -> jax.Array:
        """The leaf that a rank leaves of it."""
        thin = self.factors(rank)
        whole = jnp.matmul(thin["a"][..., None, :, :], thin["b"])
        return self.site.view.from_matrix(whole, self.site.shape)

    def factors(self, rank: int) -> dict[str, jax.Array]:
        """A and B of a rank, their columns and rows of one scale."""
        a = np.zeros((len(self.parts), self.d_in, rank))
        b = np.zeros((len(self.parts), self.window, rank, self.d_out))
        for entry, (left, strengths, right) in enumerate(self.parts):
            own = min(rank, len(strengths))
            norms = np.maximum(np.linalg.norm(left[:, :own], axis=0), 1e-300)
            scale = np.sqrt(strengths[:own] / norms)
            a[entry, :, :own] = left[:, :own] * scale
            thin = right[:own] * (strengths[:own] / np.maximum(scale, 1e-300))[:, None]
            thin = thin.reshape(own, self.window, self.d_out)
            b[entry, :, :own] = np.swapaxes(thin, 0, 1)
        shaped = lambda array: jnp.asarray(
            array.reshape(*self.batch, *array.shape[1:]), self.dtype
        )
        return {"a": shaped(a), "b": shaped(b)}
