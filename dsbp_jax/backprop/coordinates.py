"""Spectral coordinates: kernels held as `W₀ + VS`, trained through S alone."""

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.backprop import frame as frames
from dsbp_jax.backprop.columns import Columns, ColumnsState, find_layers, vectors
from dsbp_jax.backprop.cost import other_uses, step_cost, sum_cost, thin_uses
from dsbp_jax.backprop.frame import Frame
from dsbp_jax.backprop.kernels import with_taps
from dsbp_jax.backprop.seen import MAX_ROWS, Seen
from dsbp_jax.backprop.shrink import shrink_by
from dsbp_jax.layers import (
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
    require_paths,
    subsample,
    trace,
)
from dsbp_jax.ownership import own
from dsbp_jax.tracking import Coordinate, Rule, transport_moments


class Observed(NamedTuple):
    """What one pass of the model showed of some layers, for a fold.

    Attributes:
      layers: What the columns of each leaf follow, by path.
    """

    layers: dict[str, Seen]


class SpectralCoordinates(NamedTuple):
    """Training in spectral coordinates: pure functions.

    What `init`, `fold` and `merge` return shares no buffer with what they were given,
    which may be donated. Under `jax.jit` with `donate_argnums` they hold one kernel
    more than what they return, at the most.

    Attributes:
      init: `init(params, *args, key=key) -> (coords, frame)`; `args` as the loss gets
        them, a batch of the size to come. Compiles a pass of the model each time: to
        call it often, wrap it in `jax.jit`.
      value_and_grad: `value_and_grad(coords, frame, *args) -> (value, grads)`, grads
        for the coordinates; with `has_aux` the first is `(value, aux)`. With
        `observe=True` a third result is what a fold of `turn` needs to know.
      fold: `fold(coords, frame, opt_state, *args, turn=None, refresh=True, shrink=None,
        steps=None, donate=False) -> (coords, frame, opt_state)`: folds S into W₀,
        refreshes V, and moves the optimizer's moments. `args` are a batch (a part of
        the step's will do), or the one thing that `value_and_grad` observed. `turn`
        is the number of a group of leaves, None all of them. With `refresh=False` V
        and the moments stay, and no batch is needed. `shrink` multiplies the folded
        kernels (see `decay_since`); with `weight_decay`, `steps` is the number of
        steps since the last fold. With `donate=True`, outside of `jax.jit`, what was
        given is gone, and what did not change is handed on as it is.
      merge: `merge(coords, frame) -> params`.
      turns: `turns(frame)`, the number of groups that take turns.
      group: `group(frame, turn)`, the paths of one of them.
      layout: `layout(frame)`, how the coordinates are matrices, for transformations
        that want a layout.
      sizes: `sizes(frame)`, the shapes of the kernels behind them, by path.
    """

    init: Callable[..., tuple[Any, Frame]]
    value_and_grad: Callable[..., tuple[Any, ...]]
    fold: Callable[..., tuple[Any, Frame, Any]]
    merge: Callable[[Any, Frame], Any]
    turns: Callable[[Frame], int]
    group: Callable[[Frame, int | None], Collection[str]]
    layout: Callable[[Frame], Layout]
    sizes: Callable[[Frame], dict[str, tuple[int, int]]]


def spectral_coordinates(
    loss_fn: Callable[..., Any],
    rank: int = 64,
    *,
    tracking: int | None = None,
    weight_decay: float = 0.0,
    turns: int = 8,
    has_aux: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    transport: Mapping[str, Rule] | None = None,
) -> SpectralCoordinates:
    """Trains kernels as `W₀ + VS`, with gradients, state and updates of S alone.

    Between two folds a layer moves in the span of V only, so its weight gradient is
    `VᵀG = (XV)ᵀΔ`, of shape `(k, d_out)`, and that is also the size of whatever the
    optimizer keeps and writes. The loss is that of `W = W₀ + VS`, and so are all its
    derivatives by S, whatever else it does with the kernel; where a layer has many rows
    the sum is formed in each step, in the kernel's dtype, as that is cheaper than the
    products apart. Leaves are held so where that makes the whole step cheaper, the
    optimizer's reading and writing of kernels and moments included: with few rows that
    is most of it. All others are trained whole.

    `fold` every so many steps (10 to 100 do equally well), all leaves at once or group
    by group, so that no step waits for all. What it needs it has from a step that
    observes, or from a pass of its own over a batch (a part will do). Of a gradient
    `XᵀΔ` only thin products are taken. With fewer rows than columns these keep a part
    of what they followed before.

    Kernels narrower than float32 keep what rounding leaves over at a fold: in S, and
    what the columns cannot hold by rounding up or down at random.

    An optimizer that keeps averages of parameters or factors of moments is refused at
    the fold. One that reads the parameters' norms (LARS, LAMB) would see those of S,
    one that keeps largest values (Adamax) cannot follow, and their states do not give
    them away: do not use these here.

    Args:
      loss_fn: `loss_fn(params, *args)`, a floating-point scalar; a pair of it and
        anything with `has_aux`.
      rank: Columns of V.
      tracking: Those that follow the gradient; `rank // 2` by default. The others
        follow the layer's inputs.
      weight_decay: Decoupled decay of the folded kernels: each step shrinks them by
        this factor, learning rate times coefficient, done at the fold as
        `(1 − weight_decay)^steps`. On S an optimizer's own decay would only pull the
        kernel back to the last fold; mask it to the leaves that are not in
        `frame.kernels`.
      turns: Groups of leaves that `fold(…, turn=t)` folds one by one, at most.
      has_aux: As in `jax.value_and_grad`.
      betas: Decay rates of the optimizer's first and second moments, for their bias
        correction when they move.
      transport: How fields of the optimizer's state move other than `mu`, `trace`,
        `ema` and `acc_grads` (first moments) and `nu` (a second one): field name to
        `"first"`, `"second"`, `"variance"`, `"keep"` or a function `(moment,
        coordinate) -> moment`. `optax.adabelief` wants `{"nu": "variance"}`.

    Returns:
      The functions. Coordinates have the structure of the params; S has shape
      `(*batch, [window,] rank, d_out)` and at least float32.

    Raises:
      ValueError: An argument does not fit. When called: `loss_fn` returns no scalar,
        no leaf of params is the weight of a layer, coordinates lack a leaf of their
        frame, `turn` is no group, what was observed is of other leaves, or the
        optimizer cannot work on coordinates.

    References:
      [P] Muthuraman, Dynamic Spectral Backpropagation, 2025 (arXiv 2505.23369), for the
      cost O(k·d) per layer; Robert et al., LDAdam, ICLR 2025, for the moments.
      METHODS section 3.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> x = jax.random.normal(jax.random.key(0), (128, 64))
      >>> training = spectral_coordinates(loss_fn, rank=8)
      >>> coords, frame = training.init(params, x, key=jax.random.key(1))
      >>> coords["kernel"].shape
      (8, 32)
      >>> tx = optax.adam(1e-2)
      >>> opt_state = tx.init(coords)
      >>> value, grads = jax.jit(training.value_and_grad)(coords, frame, x)
      >>> updates, opt_state = tx.update(grads, opt_state, coords)
      >>> coords = optax.apply_updates(coords, updates)
      >>> coords, frame, opt_state = training.fold(coords, frame, opt_state, x)
      >>> training.merge(coords, frame)["kernel"].shape
      (64, 32)
    """
    rank = checks.positive_int("rank", rank)
    columns = Columns(rank=rank, tracking=rank // 2 if tracking is None else tracking)
    checks.in_unit_interval("weight_decay", weight_decay)
    most = checks.positive_int("turns", turns)

    def init(params: Any, *args: Any, key: jax.Array) -> tuple[Any, Frame]:
        traced = trace(loss_fn, params, args, {})
        layout = find_layers(traced, rank, has_aux, step_cost)

        def start(params: Any, state: ColumnsState, args: tuple) -> ColumnsState:
            coords, frame = frames.split(params, state, layout)
            observed = run(traced, coords, frame, args, layout, apart=True)[-1]
            return columns.follow(state, observed.layers)

        # Random columns are drawn by programs that leaves of a shape share.
        state = columns.init(params, layout, key)
        if layout:
            state = as_one_program(start, params, state, args)
        # Kernels and whole leaves are the caller's own.
        return own(frames.split(params, state, layout))

    def value_and_grad(
        coords: Any,
        frame: Frame,
        *args: Any,
        observe: bool = False,
        turn: int | None = None,
    ) -> tuple[Any, ...]:
        watched = group(frame, turn) if observe else ()
        found = run(traced_at(coords, frame, args), coords, frame, args, watched)
        return found if observe else found[:-1]

    def fold(
        coords: Any,
        frame: Frame,
        opt_state: Any,
        *args: Any,
        turn: int | None = None,
        refresh: bool = True,
        shrink: Any = None,
        steps: Any = None,
        donate: bool = False,
    ) -> tuple[Any, Frame, Any]:
        shrink = shrink_by(weight_decay, steps, shrink)
        paths, seen = group(frame, turn), {}
        if refresh and len(args) == 1 and isinstance(args[0], Observed):
            seen = args[0].layers
            require_paths(paths, seen, "what was observed in this turn")
        elif refresh:
            traced = traced_at(coords, frame, args)
            seen = run(traced, coords, frame, args, paths, apart=True)[-1].layers
        change = frames.fold_in_place if donate else frames.fold_leaf
        held = leaves_by_path(coords)
        old = {path: frames.leaf_of(held[path], frame, path) for path in paths}
        new = {path: leaf.entries for path, leaf in old.items()}
        if seen:
            new = frames.follow(new, seen, columns)
        offset = frames.offset_of(new.values()) if new else 0
        leaves, turned = {}, {}
        for path in paths:
            leaves[path], turned[path] = change(
                *old.pop(path),
                new[path],
                shrink,
                (frames.number_of(path), frame.folds),
                offset,
                view=frame.layout[path],
            )
        coords, frame = frames.with_leaves(coords, frame, leaves)
        if seen:
            move = lambda path, leaf: (
                Coordinate(leaf.shape, turned[path]) if path in turned else None
            )
            opt_state = transport_moments(
                opt_state, map_paths(move, coords), betas=betas, rules=transport
            )
        result = coords, frame, opt_state
        return result if donate else own(result)

    def group(frame: Frame, turn: int | None) -> Collection[str]:
        if turn is None:
            return tuple(frame.layout)
        parts = frames.groups(frame, most)
        return parts[checks.positive_int("turn", turn, 0, len(parts) - 1)]

    def traced_at(coords: Any, frame: Frame, args: tuple) -> Trace:
        return trace(loss_fn, jax.eval_shape(frames.merged, coords, frame), args, {})

    def run(
        traced: Trace,
        coords: Any,
        frame: Frame,
        args: tuple,
        watched: Collection[str],
        *,
        apart: bool = False,
    ) -> tuple[Any, Any, Observed]:
        """Value, gradients, and what a fold of the watched leaves needs.

        With `apart` no sum is formed where the products can be, whatever they cost.
        """
        bases = vectors(*frame.columns)
        sites = thin_uses(traced, frame.layout)
        single = _single_uses(traced, sites)
        gradients = set(watched) if columns.tracking else set()
        tapped = {
            site.path: site for site in single if site.path in gradients and _taps(site)
        }
        formed = gradients - set(tapped)
        kept = {
            site.path
            for site in single
            if site.path not in formed and (apart or _pays(site, bases[site.path]))
        }

        def visit(
            product: Product, x: jax.Array, w: jax.Array, extra: Any
        ) -> tuple[jax.Array, Any]:
            basis, coordinate, tap = extra
            site = product.site
            thin = product.operand(coordinate).astype(w.dtype)
            if site.path in formed:
                y = product(x, w)
            elif site.path in kept:
                y = product(x, w) + product.expand(
                    product.compress(x, jax.lax.stop_gradient(basis)), thin
                )
            else:
                y = product.sketched(x, w, basis, thin)
            if tap is not None:
                y = y + site.outputs.from_rows(tap.astype(y.dtype))
            if site.path not in watched:
                return y, None
            rows, limit = jax.lax.stop_gradient(x), -(-MAX_ROWS // site.repeats)
            return y, collect_rows(site, rows, None, ("inputs",), limit)

        def loss(variables: Any) -> tuple[jax.Array, Any]:
            coords, taps, kernels = variables
            held = leaves_by_path(coords)
            extras = {
                name: (
                    bases[site.path],
                    with_taps(held[site.path], bases[site.path]),
                    taps.get(site.path),
                )
                for name, site in sites.items()
            }
            sums = frames.merged(coords, frame, {**frame.kernels, **kernels}, kept)
            values = array_leaves((sums, args, {}))
            outputs, collected = evaluate(
                traced, visit, values, extras, sites=sites.values()
            )
            out = traced.unflatten(outputs)
            return checks.scalar_loss(out, has_aux), (out, collected)

        taps = {path: _zeros(site) for path, site in tapped.items()}
        kernels = {path: frame.kernels[path] for path in formed}
        (_, (out, collected)), (grads, deltas, whole) = jax.value_and_grad(
            loss, has_aux=True
        )((coords, taps, kernels))
        inputs: dict[str, list] = {path: [] for path in watched}
        for name, site in sites.items():
            if site.path in inputs:
                rows = gather_rows(site, collected[name], ("inputs",), MAX_ROWS)
                inputs[site.path].append(rows)
        layers = {
            path: Seen(
                tuple(rows),
                subsample(deltas[path], MAX_ROWS) if path in deltas else None,
                whole.get(path),
            )
            for path, rows in inputs.items()
        }
        return out, grads, Observed(layers)

    return SpectralCoordinates(
        init,
        value_and_grad,
        fold,
        frames.merge,
        turns=lambda frame: len(frames.groups(frame, most)),
        group=group,
        layout=frames.views,
        sizes=frames.sizes,
    )


def _single_uses(traced: Trace, sites: Mapping[str, Site]) -> list[Site]:
    """The sites of leaves that have no other use."""
    elsewhere = other_uses(traced, sites)
    uses = collections.Counter(site.path for site in sites.values())
    return [
        site
        for site in sites.values()
        if uses[site.path] == 1 and site.path not in elsewhere
    ]


def _pays(site: Site, basis: jax.Array) -> bool:
    """Whether a layer answers `xW₀ + (xV)S`, instead of `x(W₀ + VS)`."""
    apart, together = sum_cost(site, basis.shape[-1])
    return apart < together


def _taps(site: Site) -> bool:
    """Whether all rows of Δ can be had from one visit for each matrix."""
    return site.kind == "dense" and site.repeats == 1 and not site.conditional


def _zeros(site: Site) -> jax.Array:
    """What is added to a response for its derivative, `(*batch, n, d_out)`."""
    *batch, _, _, d_out = site.view.matrix_shape(site.shape)
    return jnp.zeros((*batch, site.outputs.num_rows, d_out))
