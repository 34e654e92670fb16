"""What layers meet, as rows: taken, modelled, moved."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.layers import (
    Product,
    Site,
    Trace,
    array_leaves,
    collect_rows,
    evaluate,
)
from dsbp_jax.linalg import Spiked, Transport, absorb, transport

Models = dict[str, Spiked]  # by layer, each leaf of shape (*batch, …)

_INPUTS = ("inputs",)


def movable(traced: Trace) -> list[Site]:
    """The layers that meet their inputs once in a forward pass, as an array of its own.

    Left out: kernels that a loop shares, those joined from several leaves, those in a
    branch, and those inside of the user's own derivative rules.
    """
    return [
        site
        for site in traced.sites
        if site.rule is None
        and site.repeats == 1
        and not (site.fused or site.conditional)
    ]


def rows_of(site: Site, x: jax.Array, limit: int) -> jax.Array:
    """Rows of a layer's input, `(*batch, n, d)`, at most so many of each matrix."""
    return collect_rows(site, x, None, _INPUTS, limit)["inputs"]


def each(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one matrix, for all that one visit of a layer sees."""
    for _, digits in site.inputs.batch:
        for _ in digits:
            function = jax.vmap(function)
    return function


def watched_pass(
    traced: Trace,
    arrays: Sequence[Any],
    models: Mapping[str, Spiked],
    weight: Any,
    limit: int,
) -> tuple[Any, Models]:
    """The function as it is, and models with what its layers met.

    Args:
      traced: The function.
      arrays: The array leaves of its arguments.
      models: Of the layers to look at.
      weight: Of this batch, in [0, 1].
      limit: Rows of each layer, at most.

    Returns:
      What the function returns, and the models after it.
    """

    def visit(product: Product, x: jax.Array, w: jax.Array, extra: Any) -> Any:
        rows = rows_of(product.site, x, limit)
        learn = each(product.site, lambda model, rows: absorb(model, rows, weight))
        return product(x, w), learn(extra, rows)

    return _run(traced, arrays, visit, models)


def moved_pass(
    traced: Trace,
    arrays: Sequence[Any],
    source: Mapping[str, Spiked],
    models: Mapping[str, Spiked],
    weight: Any,
    limit: int,
    stretch: float,
    chosen: Mapping[str, Any] | None = None,
) -> tuple[Any, Models]:
    """The function with the inputs of some layers moved to where the source had them.

    Args:
      traced: The function.
      arrays: The array leaves of its arguments.
      source: Models of the layers to move, on source data.
      models: The tracked ones, before this batch.
      weight: Of this batch, in [0, 1].
      limit: Rows of each layer whose statistics are taken, at most.
      stretch: No direction is stretched or shrunk by more.
      chosen: Which of them are moved, as data; all by default.

    Returns:
      What the function returns then, and the models after it.
    """

    def visit(product: Product, x: jax.Array, w: jax.Array, extra: Any) -> Any:
        site, (wanted, model, switch) = product.site, extra

        def respond(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Spiked]:
            rows = rows_of(site, x, limit)
            new = each(site, lambda t, rows: absorb(t, rows, weight))(model, rows)
            maps = each(site, lambda s, t: transport(s, t, stretch))(wanted, new)
            return _response(product, x, w, maps), new

        if switch is None:
            return respond(x, w)
        taken = jnp.max(switch) > 0
        return jax.lax.cond(taken, respond, lambda x, w: (product(x, w), model), x, w)

    extras = {
        name: (source[name], models[name], None if chosen is None else chosen[name])
        for name in source
    }
    return _run(traced, arrays, visit, extras)


def _response(
    product: Product, x: jax.Array, w: jax.Array, maps: Transport
) -> jax.Array:
    """What a layer answers to its input, moved."""
    site = product.site
    # Taking rows is an order of entries: this puts them back.
    back = lambda rows: jax.linear_transpose(site.inputs.to_rows, x)(rows)[0]
    rows = jax.eval_shape(site.inputs.to_rows, x)
    if site.kind == "convolution" and len(rows.shape) == 2:
        # Of `xA + c` the kernel takes the first part, at no cost for any position; the
        # second is alike for all images, and not at their borders.
        constant = back(jnp.broadcast_to(maps.offset.astype(x.dtype), rows.shape))
        (axis, *_), *_ = product.equation.params["dimension_numbers"]
        first = jax.lax.slice_in_dim(constant, 0, 1, axis=axis)
        moved = product.restrict(w, maps.matrix)
        return product(x, moved) + product(first, w)
    moved = each(site, lambda one, rows: one(rows))(maps, site.inputs.to_rows(x))
    return product(back(moved), w)


def _run(
    traced: Trace, arrays: Sequence[Any], visit: Any, extras: Mapping[str, Any]
) -> tuple[Any, Models]:
    """Evaluates with extras of one entry per matrix; collects such."""
    sites = [site for site in traced.sites if site.name in extras]
    outputs, collected = evaluate(traced, visit, arrays, extras, sites=sites)
    return traced.unflatten(outputs), {
        site.name: jax.tree.map(lambda a, s=site: _gathered(s, a), collected[site.name])
        for site in sites
    }


def _gathered(site: Site, array: jax.Array) -> jax.Array:
    """What visits left for each matrix, `(*lengths, *local, …)`, as `(*batch, …)`."""
    local = sum(len(digits) for _, digits in site.inputs.batch)
    ahead = len(site.lengths) + local
    flat = array.reshape(*array.shape[:ahead], -1, 1)
    return site.gather(flat).reshape(*site.batch_shape, *array.shape[ahead:])


def canonical(x: Any) -> Any:
    """A NumPy array in the dtype that it has under `jax.jit`; others as they are."""
    if not isinstance(x, np.ndarray):
        return x
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def finite(arrays: Iterable[Any]) -> jax.Array:
    """Whether all floating-point arrays are finite."""
    total = jnp.float32(0)
    for array in arrays:
        if jnp.issubdtype(array.dtype, jnp.inexact):
            total += jnp.sum(array * 0).astype(jnp.float32)
    return jnp.isfinite(total)


def arguments(params: Any, x: Any) -> list[Any]:
    """The array leaves of the arguments of `fn(params, x)`."""
    return array_leaves((params, x))
