"""Capturing what every layer saw and answered, in the model's own forward pass."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.checks import positive_int
from dsbp_jax.layers import primitives
from dsbp_jax.layers.activations import LayerActivations
from dsbp_jax.layers.finder import Trace, array_leaves, trace
from dsbp_jax.layers.product import Product
from dsbp_jax.layers.rewrite import evaluate
from dsbp_jax.layers.sites import Site

_SIDES = ("inputs", "outputs")

Respond = Callable[[Product, jax.Array, jax.Array], jax.Array]


def capture_activations(
    fn: Callable[..., Any],
    *,
    max_rows: int | None = None,
    which: Iterable[str] = _SIDES,
) -> Callable[..., tuple[Any, dict[str, LayerActivations]]]:
    """Makes a model function return its layers' activations as well.

    The layers are found by how `fn` uses its parameters; nothing needs to be
    registered. `fn` is run once, equation by equation and with its own
    derivative rules, so the result and its gradient are those of `fn`, and the
    captured function may be the loss itself under `jax.value_and_grad`. What is
    inside a `jax.custom_vjp` or `jax.custom_jvp` is captured from a second
    evaluation of its primal, which a compiler can merge. Each call traces `fn`,
    so wrap the outermost function in `jax.jit`; inner ones are taken apart. Their
    shardings stay; what they say of donation and compilation does not, and outside of
    any `jax.jit` their results agree to rounding only.

    Stacked kernels (`jax.lax.scan` over layers, experts) have batch axes in
    front. A kernel that a loop uses again and again has the rows of all
    iterations, time first. Of a convolution the rows are positions and the
    features are channels. Kernels inside a `while` loop, of grouped convolutions
    and others that `explain` lists are left out.

    Of leaves that are joined into one kernel before they meet the input (fused gates,
    fused queries, keys and values) each is a layer. Its outputs are its own features
    of the response, or, where it has its own features of the input and the response
    is a sum, its own term of it: always its inputs times the leaf.

    Args:
      fn: A function `fn(params, *args, **kwargs)` that returns any pytree.
        Arguments that are no arrays are static, as in a plain call.
      max_rows: At most so many rows per matrix, every s-th modulo their number,
        with the smallest s that covers all and has no divisor in common with
        that number, so that it does not fall in step with a sequence length.
        Inside a loop that shares the kernel the cap holds for each iteration
        until the loop ends.
      which: `"inputs"`, `"outputs"` or both.

    Returns:
      A function of the same arguments that returns `(out, activations)`: the
      result of `fn` and a dict from canonical path (`path#1`, … for further
      uses of a leaf) to `LayerActivations`, in the dtype of the computation; each
      knows the matrix view of its use.

    Raises:
      ValueError: `max_rows` is no positive integer, or `which` names something
        else. When called: no leaf of `params` is used as a layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: jax.nn.relu(x @ params["kernel"]) + params["bias"]
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> out, activations = capture_activations(model)(params, jnp.ones((5, 3)))
      >>> activations["kernel"].inputs.shape, activations["kernel"].outputs.shape
      ((5, 3), (5, 2))
    """
    limit = None if max_rows is None else positive_int("max_rows", max_rows)
    sides = _sides(which)
    return capture_through(fn, lambda product, x, w: product(x, w), sides, limit)


def capture_through(
    fn: Callable[..., Any],
    respond: Respond,
    sides: tuple[str, ...] = _SIDES,
    limit: int | None = None,
) -> Callable[..., tuple[Any, dict[str, LayerActivations]]]:
    """`capture_activations` with the layers' responses in other hands.

    Args:
      fn: As there.
      respond: `respond(product, x, w)`, the response of a layer.
      sides: As `which` there.
      limit: As `max_rows` there.

    Returns:
      As there.
    """

    def captured(
        params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, LayerActivations]]:
        traced = trace(fn, params, args, kwargs)
        if not traced.sites:
            raise ValueError(
                f"params match no layer: none of {len(traced.leaves)} array leaves is "
                "the weight of a matrix product or convolution in fn; "
                "dsbp_jax.explain(fn, params, *args) says why, leaf by leaf"
            )
        arrays = array_leaves((params, args, kwargs))
        return capture_traced(traced, arrays, respond, sides, limit)

    return captured


def capture_traced(
    traced: Trace,
    arrays: Sequence[Any],
    respond: Respond = lambda product, x, w: product(x, w),
    sides: tuple[str, ...] = _SIDES,
    limit: int | None = None,
) -> tuple[Any, dict[str, LayerActivations]]:
    """Runs a function that was traced before, and captures its activations.

    Args:
      traced: The function.
      arrays: The array leaves of `(params, args, kwargs)`.
      respond: As for `capture_through`.
      sides: Likewise.
      limit: Likewise.

    Returns:
      Its result and the activations.
    """

    def visit(
        product: Product, x: jax.Array, w: jax.Array, extra: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = own = respond(product, x, w)
        if product.site.summed and "outputs" in sides:
            alone = dataclasses.replace(product, response=None)
            own = respond(alone, *product.summand(x, w))
        return y, collect_rows(product.site, x, own, sides, limit)

    outputs, collected = evaluate(traced, visit, arrays, sites=traced.sites)
    activations = {
        site.name: gather_rows(site, collected[site.name], sides, limit)
        for site in traced.sites
    }
    return traced.unflatten(outputs), activations


def collect_rows(
    site: Site,
    x: jax.Array,
    y: jax.Array | None,
    sides: tuple[str, ...],
    limit: int | None,
) -> dict[str, jax.Array]:
    """What one visit of a site leaves for `gather_rows`.

    Args:
      site: The site.
      x: Its input.
      y: Its response; needed for the outputs.
      sides: `"inputs"`, `"outputs"` or both.
      limit: At most so many rows.

    Returns:
      Rows by side; where the site may not be reached, also a mark that it was.
    """
    found = {}
    if "inputs" in sides:
        found["inputs"] = subsample(site.inputs.to_rows(x), limit)
    if "outputs" in sides and y is not None:
        found["outputs"] = subsample(site.outputs.to_rows(y), limit)
    if site.conditional:
        rows = found[sides[-1]]
        found["valid"] = jnp.ones((*rows.shape[:-1], 1), jnp.int32)
    return found


def gather_rows(
    site: Site, found: dict[str, jax.Array], sides: tuple[str, ...], limit: int | None
) -> LayerActivations:
    """The visits of one site as `LayerActivations`; arguments as `collect_rows`."""
    found = {
        name: subsample(site.gather(stacked), limit) for name, stacked in found.items()
    }
    if "valid" in found:
        count = jnp.sum(found["valid"], axis=(-2, -1), dtype=jnp.int32)
    else:
        rows = found[sides[-1]]
        count = jnp.full(rows.shape[:-2], rows.shape[-2], jnp.int32)
    return LayerActivations(found.get("inputs"), found.get("outputs"), count, site.view)


def subsample(rows: jax.Array, limit: int | None) -> jax.Array:
    """At most `limit` of the rows of `rows`, shape `(*batch, n, d)`.

    Which ones depends on their number and the limit alone.
    """
    number = rows.shape[-2]
    if limit is None or number <= limit:
        return rows
    stride = -(-number // limit)
    while math.gcd(stride, number) != 1:
        stride += 1
    indices = np.sort(np.arange(limit) * stride % number)
    sharding = primitives.explicit_sharding(rows)
    if sharding is not None:
        spec = list(sharding.spec) + [None] * (rows.ndim - len(sharding.spec))
        spec[-2] = None
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return rows.at[..., indices, :].get(
        mode="promise_in_bounds", unique_indices=True, out_sharding=sharding
    )


def _sides(which: Iterable[str]) -> tuple[str, ...]:
    names = isinstance(which, Iterable) and not isinstance(which, str)
    given = tuple(which) if names else ()
    if not given or not all(side in _SIDES for side in given):
        raise ValueError(
            f'which must be a tuple of "inputs", "outputs" or both, got {which!r}'
        )
    return tuple(side for side in _SIDES if side in given)
