"""Spectral backpropagation: weight gradients through a sketch of the layer's input."""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.backprop import thin
from dsbp_jax.backprop.columns import (
    Columns,
    ColumnsState,
    find_layers,
    outside,
    vectors,
)
from dsbp_jax.backprop.cost import other_uses, sketched_sites, thin_uses
from dsbp_jax.backprop.seen import MAX_ROWS
from dsbp_jax.layers import (
    LayerActivations,
    Layout,
    Product,
    Site,
    Trace,
    array_leaves,
    as_one_program,
    collect_rows,
    evaluate,
    gather_rows,
    leaves_by_path,
    map_paths,
    trace,
    use_name,
)
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import specs_of, with_auto_axes
from dsbp_jax.ownership import own

_REFRESH_EVERY = 20


class SketchState(NamedTuple):
    """What spectral backpropagation carries from one step to the next.

    Attributes:
      key: Of the random columns to come.
      columns: The tracked columns.
    """

    key: jax.Array
    columns: ColumnsState


class SpectralBackprop(NamedTuple):
    """Spectral backpropagation of one loss: four pure functions.

    The states that they return share no buffer with what they were given, which may
    be donated.

    Attributes:
      init: `init(params, *args, key=key) -> state`; `args` as the loss gets them, a
        batch of the size to come. Compiles a pass of the model each time: to call
        it often, wrap it in `jax.jit`.
      value_and_grad: `value_and_grad(params, state, *args) -> (value, grads, state)`;
        with `has_aux` the first is `(value, aux)`.
      catch_up: `catch_up(params, state, *args, every=T) -> (value, grads, state)`: the
        exact gradient, for one step in every T, with what is outside of the columns
        T times over.
      refresh: `refresh(params, state, *args) -> state`, all columns refreshed by one
        exact pass over a batch, which may be a part of the step's.
    """

    init: Callable[..., SketchState]
    value_and_grad: Callable[..., tuple[Any, Any, SketchState]]
    catch_up: Callable[..., tuple[Any, Any, SketchState]]
    refresh: Callable[..., SketchState]


def spectral_backprop(
    loss_fn: Callable[..., Any],
    rank: int = 64,
    *,
    tracking: int = 0,
    random: int = 0,
    residual: float | None = None,
    refresh_every: int | str | None = "auto",
    has_aux: bool = False,
) -> SpectralBackprop:
    """`jax.value_and_grad` with cheap weight gradients, on an unmodified model.

    For a layer `Y = XW` with Δ = ∂L/∂Y the exact gradient is `XᵀΔ`. Here it is

        Ĝ = B((XB)ᵀΔ),   B = [V, √κ (I − VVᵀ)R],

    with `rank` orthonormal columns V and `random` columns R of ±1/√r, drawn anew in
    each step. Values, the gradients of inputs and of every leaf that is not sketched
    are exact. The weight gradient needs only `XB`, so X is freed unless something else
    keeps it: the derivative of the activation that made it (tanh), another consumer,
    and up to 1,024 rows for the refresh. In expectation Ĝ is `VVᵀG + κ(I − VVᵀ)G`.

    Whatever else the loss does with a sketched leaf, `Ĝ = BBᵀG` of its whole gradient
    G: further products that see it as the same matrix are sketched as well, and the
    gradient of any other use (tied the other way round, penalised) is projected.

    A leaf is sketched where it is the weight of a matrix product or an ungrouped
    convolution (over input channels) and the sketch is cheaper than the exact
    gradient; `dsbp_jax.explain(loss_fn, params, *args, rank=rank + random)` says for
    which, and why not. A layer of input dimension up to the number of columns, or
    with fewer rows, keeps its exact gradient.

    What lies outside of V is small and not useless. `catch_up` in place of every T-th
    `value_and_grad` brings it back: there G is exact and `VVᵀG + T(I − VVᵀ)G` is
    returned, so that over T steps every direction moves as far as it would by plain
    gradients. With T = 4 the products of a step still cost about 0.76 of the plain
    one's. It is noise as well, which wants a lower learning rate.

    Wrap the training step in `jax.jit`: each call traces the loss anew.

    Args:
      loss_fn: `loss_fn(params, *args)`, a floating-point scalar; a pair of it and
        anything with `has_aux`.
      rank: Orthonormal columns of each layer.
      tracking: Those that follow the gradient (the eigenvectors of GGᵀ); the others
        follow the layer's inputs. They need exact gradients, so they are renewed by
        `refresh` only: call it every so many steps.
      random: Random columns r.
      residual: κ in [0, 1]; 1 is unbiased, and noisy: the variance grows as
        κ²(d − rank)/r. By default the κ of least mean squared error,
        `r/(r + d − k)`, or less where the step would be unstable,
        `(λ₁/λ)·r/(√r + √(d − k))²`, λ an upper bound of what lies outside V: the
        last Ritz value or the rest of the trace.
      refresh_every: Steps between two refreshes of a layer's columns within
        `value_and_grad`, the layers in turn, from up to 1,024 rows of its inputs.
        None leaves all refreshes to `refresh`. By default 20, and None where columns
        follow the gradient.
      has_aux: As in `jax.value_and_grad`.

    Returns:
      The four functions. `dsbp_jax.bases(state)` reads the bases out of a state.

    Raises:
      ValueError: An argument does not fit. When called: `loss_fn` returns no scalar,
        no leaf of params is the weight of a layer, or the batch of `init` or `refresh`
        has fewer rows than columns.

    References:
      [P] Muthuraman, Dynamic Spectral Backpropagation, 2025 (arXiv 2505.23369), for the
      projection; projecting inside the reverse pass is this library's [O].
      METHODS section 3.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> x = jax.random.normal(jax.random.key(0), (128, 64))
      >>> backprop = spectral_backprop(loss_fn, rank=8)
      >>> state = backprop.init(params, x, key=jax.random.key(1))
      >>> value, grads, state = jax.jit(backprop.value_and_grad)(params, state, x)
      >>> grads["kernel"].shape
      (64, 32)
    """
    every: Any = refresh_every
    if refresh_every == "auto":
        every = None if tracking else _REFRESH_EVERY
    automatic = every is not None
    columns = Columns(
        rank=rank, tracking=tracking, refresh_every=every if automatic else 1
    )
    if automatic and columns.tracking:
        raise ValueError(
            f"tracking must be 0 unless refresh_every=None, got {tracking}: columns "
            "that follow the gradient are renewed by SpectralBackprop.refresh"
        )
    random = checks.positive_int("random", random, minimum=0)
    if residual is not None:
        checks.in_unit_interval("residual", residual)
        if not random:
            raise ValueError(
                f"residual must be None without random columns, got {residual!r}"
            )
    total = columns.rank + random

    def init(params: Any, *args: Any, key: jax.Array) -> SketchState:
        traced = trace(loss_fn, params, args, {})
        layout = find_layers(traced, total, has_aux)
        start, key = jax.random.split(key)
        measured = lambda params, state, args: columns.measure(
            traced, state, params, layout, args, has_aux=has_aux
        )
        state = columns.init(params, layout, start)
        return SketchState(key, as_one_program(measured, params, state, args))

    def refresh(params: Any, state: SketchState, *args: Any) -> SketchState:
        traced = trace(loss_fn, params, args, {})
        new = columns.measure(
            traced, state.columns, params, _layout(traced, state), args, has_aux=has_aux
        )
        return own(state._replace(columns=new))

    def value_and_grad(
        params: Any, state: SketchState, *args: Any
    ) -> tuple[Any, Any, SketchState]:
        traced = trace(loss_fn, params, args, {})
        first = _sketched(traced, state, total)
        views = {path: site.view for path, site in first.items()}
        sites = thin_uses(traced, views)
        bases = vectors(*state.columns)
        key, draw = jax.random.split(state.key)
        if random:
            leading = state.columns.activation.tracked.get("input", {})
            bases = {
                path: _with_random(
                    bases[path],
                    leading[path].basis if path in leading else None,
                    jax.random.fold_in(draw, index),
                    random,
                    residual,
                )
                for index, path in enumerate(sorted(first))
            }
        bases = {path: jax.lax.stop_gradient(bases[path]) for path in first}
        kernels, held = leaves_by_path(params), other_uses(traced, sites)
        variables = map_paths(
            lambda path, leaf: (
                thin.zero(first[path], leaf, bases[path]) if path in first else leaf
            ),
            params,
        )

        def visit(
            product: Product, x: jax.Array, w: jax.Array, extra: Any
        ) -> tuple[jax.Array, Any]:
            basis, variable = extra
            operand = product.operand(variable).astype(w.dtype)
            y = product.sketched(x, w, basis, operand)
            if not automatic:
                return y, None
            limit = -(-MAX_ROWS // product.site.repeats)
            x = jax.lax.stop_gradient(x)
            return y, collect_rows(product.site, x, None, ("inputs",), limit)

        def kernel(path: str, variable: jax.Array) -> Any:
            if path not in first:
                return variable
            if path not in held:
                return kernels[path]
            return thin.hold(first[path], kernels[path], bases[path], variable)

        def loss(variables: Any) -> tuple[jax.Array, Any]:
            by_path = leaves_by_path(variables)
            outputs, collected = evaluate(
                traced,
                visit,
                array_leaves((map_paths(kernel, variables), args, {})),
                {
                    name: (bases[site.path], by_path[site.path])
                    for name, site in sites.items()
                },
                sites=sites.values(),
            )
            out = traced.unflatten(outputs)
            return checks.scalar_loss(out, has_aux), (out, collected)

        (_, (out, collected)), grads = jax.value_and_grad(loss, has_aux=True)(variables)
        grads = map_paths(
            lambda path, grad: (
                thin.expand(first[path], bases[path], grad, kernels[path])
                if path in first
                else grad
            ),
            grads,
        )
        new = state.columns
        if automatic and first:
            rows = _rows(sites, collected)
            new = columns.update(new, params, Layout(views), activations=rows)
        return out, grads, own(SketchState(key, new))

    def catch_up(
        params: Any, state: SketchState, *args: Any, every: float | jax.Array
    ) -> tuple[Any, Any, SketchState]:
        checks.at_least_one("every", every)

        traced = trace(loss_fn, params, args, {})

        def loss(params: Any) -> tuple[jax.Array, Any]:
            out = traced.run(array_leaves((params, args, {})))
            return checks.scalar_loss(out, has_aux), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        first = _sketched(traced, state, total)

        def weigh(grads: Any, bases: Any, more: jax.Array) -> Any:
            def add(path: str, gradient: Any) -> Any:
                if path not in first:
                    return gradient
                rest = outside(gradient, first[path].view, bases[path])
                return (gradient + more * rest).astype(gradient.dtype)

            return map_paths(add, grads)

        bases, more = vectors(*state.columns), jnp.float32(every) - 1
        grads = with_auto_axes(
            weigh, grads, bases, more, out_specs=lambda: specs_of(grads)
        )
        return out, grads, own(state)

    return SpectralBackprop(init, value_and_grad, catch_up, refresh)


def _sketched(traced: Trace, state: SketchState, columns: int) -> dict[str, Site]:
    """The leaves that are sketched on this batch, by their first use."""
    held = vectors(*state.columns)
    sites = sketched_sites(traced, columns)
    return {path: site for path, site in sites.items() if path in held}


def _rows(
    sites: Mapping[str, Site], collected: Mapping[str, Any]
) -> dict[str, LayerActivations]:
    """The inputs of all uses of each leaf, numbered without those left out."""
    rows: dict[str, LayerActivations] = {}
    counts = collections.Counter[str]()
    for name, site in sites.items():
        layer = gather_rows(site, collected[name], ("inputs",), MAX_ROWS)
        rows[use_name(site.path, counts[site.path])] = layer
        counts[site.path] += 1
    return rows


def _layout(traced: Trace, state: SketchState) -> Layout:
    """The views of the leaves that a state has columns for."""
    held = vectors(*state.columns)
    return Layout((s.path, s.view) for s in traced.sites if s.name in held)


def _with_random(
    basis: jax.Array,
    leading: EigenBasis | None,
    key: jax.Array,
    number: int,
    residual: float | None,
) -> jax.Array:
    """The columns `[V, √κ (I − VVᵀ)R]`."""
    *batch, dim, rank = basis.shape
    signs = jax.random.rademacher(key, (*batch, dim, number), jnp.float32)
    with jax.default_matmul_precision("highest"):
        noise = (signs - basis @ (basis.mT @ signs)) / jnp.sqrt(number)
    kappa = jnp.asarray(
        _stable_residual(leading, dim, rank, number) if residual is None else residual
    )
    noise = noise * jnp.sqrt(kappa.astype(jnp.float32))[..., None, None]
    return jnp.concatenate([basis, noise], axis=-1)


def _stable_residual(
    leading: EigenBasis | None, dim: int, rank: int, number: int
) -> jax.Array:
    """The κ of least mean squared error, or less where that would be unstable."""
    rest = dim - rank
    least_error = number / (number + rest)
    # RRᵀ stretches the d − k other directions by up to (1 + √((d − k)/r))².
    bound = number / (number**0.5 + rest**0.5) ** 2
    if leading is None:
        return jnp.float32(bound)
    tail = jnp.maximum(leading.trace - jnp.sum(leading.values, axis=-1), 0)
    largest = jnp.minimum(leading.values[..., -1], tail)
    ratio = leading.values[..., 0] / jnp.where(largest > 0, largest, 1)
    ratio = jnp.where(largest > 0, jnp.maximum(ratio, 1), jnp.inf)
    return jnp.minimum(least_error, ratio * bound)
