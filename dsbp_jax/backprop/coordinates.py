"""Spectral coordinates: kernels held as `W₀ + VS`, trained through S alone."""

import collections
import dataclasses
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
    vectors,
)
from dsbp_jax.backprop.cost import other_uses, thin_uses
from dsbp_jax.layers import (
    Layout,
    Product,
    Site,
    Trace,
    array_leaves,
    evaluate,
    leaves_by_path,
    map_paths,
    trace,
)
from dsbp_jax.ownership import own
from dsbp_jax.tracking import Coordinate, Rule, rotation, transport_moments, wide

# Forming W₀ + VS also writes and reads whole kernels: measured on a CPU, at widths of
# 2048 and 4096, it pays from twice its own multiply-adds.
_SUM_COST = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """What the coordinates stand on; changes at a fold only.

    Attributes:
      kernels: Canonical path to `W₀`, in the shape and dtype of the parameter.
      columns: The columns V of every such leaf.
      layout: The matrix view of every such leaf; static.
    """

    kernels: dict[str, jax.Array]
    columns: ColumnsState
    layout: Layout = dataclasses.field(metadata={"static": True})


class SpectralCoordinates(NamedTuple):
    """Training in spectral coordinates: four pure functions.

    What `init`, `fold` and `merge` return shares no buffer with what they were given,
    which may be donated.

    Attributes:
      init: `init(params, *args, key=key) -> (coords, frame)`; `args` as the loss gets
        them, a batch of the size to come.
      value_and_grad: `value_and_grad(coords, frame, *args) -> (value, grads)`, grads
        for the coordinates; with `has_aux` the first is `(value, aux)`.
      fold: `fold(coords, frame, opt_state, *args, steps=None) -> (coords, frame,
        opt_state)`: folds S into W₀, refreshes V on a batch (a part of the step's will
        do), and moves the optimizer's moments. With `weight_decay`, `steps` is the
        number of steps since the last fold.
      merge: `merge(coords, frame) -> params`.
    """

    init: Callable[..., tuple[Any, Frame]]
    value_and_grad: Callable[..., tuple[Any, Any]]
    fold: Callable[..., tuple[Any, Frame, Any]]
    merge: Callable[[Any, Frame], Any]


def spectral_coordinates(
    loss_fn: Callable[..., Any],
    rank: int = 64,
    *,
    tracking: int | None = None,
    weight_decay: float = 0.0,
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
    products apart. Which leaves are held so
    is decided as in `spectral_backprop`; all others are trained whole.

    `fold` every so many steps (10 to 100 do equally well): it takes one exact gradient
    of the batch it is given, so a part of a batch makes it cheap. The more columns the
    better; what they follow matters less (the README has a table).

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
      has_aux: As in `jax.value_and_grad`.
      betas: Decay rates of the optimizer's first and second moments, for their bias
        correction when they move.
      transport: How fields of the optimizer's state move other than `mu`, `trace`,
        `ema` and `acc_grads` (first moments) and `nu` (a second one): field name to
        `"first"`, `"second"`, `"variance"`, `"keep"` or a function `(moment,
        coordinate) -> moment`. `optax.adabelief` wants `{"nu": "variance"}`.

    Returns:
      The four functions. Coordinates have the structure of the params; S has shape
      `(*batch, [window,] rank, d_out)` and at least float32.

    Raises:
      ValueError: An argument does not fit. When called: `loss_fn` returns no scalar,
        no leaf of params is the weight of a layer, the batch of a fold has fewer rows
        than columns, or the optimizer cannot work on coordinates.

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

    def init(params: Any, *args: Any, key: jax.Array) -> tuple[Any, Frame]:
        traced = trace(loss_fn, params, args, {})
        layout = find_layers(traced, rank, has_aux)
        state = columns.init(params, layout, key)
        state = columns.measure(traced, state, params, layout, args, has_aux=has_aux)
        # Kernels and whole leaves are the caller's own.
        return own(_split(params, state, layout))

    def value_and_grad(coords: Any, frame: Frame, *args: Any) -> tuple[Any, Any]:
        bases = vectors(*frame.columns)
        whole = jax.eval_shape(_merged, coords, frame)
        traced = trace(loss_fn, whole, args, {})
        sites = thin_uses(traced, frame.layout)
        apart = _kept_apart(traced, sites, bases)

        def visit(
            product: Product, x: jax.Array, w: jax.Array, extra: Any
        ) -> tuple[jax.Array, None]:
            basis, coordinate = extra
            small = product.operand(coordinate).astype(w.dtype)
            if product.site.path in apart:
                return product(x, w) + product.expand(
                    product.compress(x, jax.lax.stop_gradient(basis)), small
                ), None
            return product.sketched(x, w, basis, small), None

        def loss(coords: Any) -> tuple[jax.Array, Any]:
            held = leaves_by_path(coords)
            extras = {
                name: (bases[site.path], thin.taps(held[site.path], bases[site.path]))
                for name, site in sites.items()
            }
            params = map_paths(
                lambda path, leaf: frame.kernels[path] if path in apart else leaf,
                _merged(coords, frame),
            )
            values = array_leaves((params, args, {}))
            outputs, _ = evaluate(traced, visit, values, extras, sites=sites.values())
            out = traced.unflatten(outputs)
            return checks.scalar_loss(out, has_aux), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(coords)
        return out, grads

    def fold(
        coords: Any, frame: Frame, opt_state: Any, *args: Any, steps: Any = None
    ) -> tuple[Any, Frame, Any]:
        params = _merged(coords, frame)
        if not checks.is_static(weight_decay, 0):
            if steps is None:
                raise ValueError(
                    "steps must be the number of steps since the last fold, because "
                    f"weight_decay={weight_decay!r}, got None"
                )
            shrink = (1 - weight_decay) ** checks.non_negative("steps", steps)
            params = map_paths(
                lambda path, leaf: (
                    (leaf * shrink).astype(leaf.dtype)
                    if path in frame.kernels
                    else leaf
                ),
                params,
            )
        old = vectors(*frame.columns)
        traced = trace(loss_fn, params, args, {})
        state = columns.measure(
            traced, frame.columns, params, frame.layout, args, has_aux=has_aux
        )
        new = vectors(*state)
        moved = map_paths(
            lambda path, leaf: (
                Coordinate(leaf.shape, rotation(new[path], old[path]))
                if path in new
                else None
            ),
            coords,
        )
        opt_state = transport_moments(opt_state, moved, betas=betas, rules=transport)
        coords, frame = _split(params, own(state), frame.layout)
        # Kernels are sums and new; whole leaves, and moments of theirs, are not.
        return own(coords), frame, own(opt_state)

    return SpectralCoordinates(init, value_and_grad, fold, merge)


def _kept_apart(
    traced: Trace, sites: Mapping[str, Site], bases: Mapping[str, jax.Array]
) -> set[str]:
    """The leaves whose layer answers `xW₀ + (xV)S`, instead of `x(W₀ + VS)`.

    The former takes two thin products of the rows more in the forward and one in the
    reverse pass, the latter one of the kernel's size, and memory for the sum. Only a
    leaf without any other use can be kept apart.
    """
    elsewhere = other_uses(traced, sites)
    uses = collections.Counter(site.path for site in sites.values())
    apart = set()
    for site in sites.values():
        *_, taps, d_in, d_out = site.view.matrix_shape(site.shape)
        path, rank = site.path, bases[site.path].shape[-1]
        rows = site.repeats * site.inputs.num_rows
        by_rows = rank * rows * (d_in + 2 * taps * d_out)
        alone = uses[path] == 1 and path not in elsewhere
        if alone and by_rows < _SUM_COST * rank * taps * d_in * d_out:
            apart.add(path)
    return apart


def merge(coords: Any, frame: Frame) -> Any:
    """The parameters that coordinates stand for, `W₀ + VS` where a leaf is held so.

    Args:
      coords: The coordinates.
      frame: Their frame.

    Returns:
      A tree of the same structure, in the shapes and dtypes of the parameters. It
      shares no buffer with `coords`, which may be donated.
    """
    whole = lambda path, leaf: leaf if path in frame.kernels else own(leaf)
    return map_paths(whole, _merged(coords, frame))


def _merged(coords: Any, frame: Frame) -> Any:
    """`merge`, with the whole leaves as they are."""
    bases = vectors(*frame.columns)

    def whole(path: str, leaf: jax.Array) -> jax.Array:
        kernel = frame.kernels.get(path)
        if kernel is None:
            return leaf
        return thin.added(kernel, frame.layout[path], bases[path], leaf)

    return map_paths(whole, coords)


def _split(params: Any, columns: ColumnsState, layout: Layout) -> tuple[Any, Frame]:
    """Coordinates at zero, and the frame that makes them `params`."""
    bases = vectors(*columns)
    leaves = leaves_by_path(params)
    kernels = {path: leaves[path] for path in layout}

    def coordinate(path: str, leaf: Any) -> Any:
        if path not in kernels:
            return leaf
        *batch, taps, _, d_out = layout[path].matrix_shape(leaf.shape)
        window = (taps,) if taps > 1 else ()
        shape = (*batch, *window, bases[path].shape[-1], d_out)
        return jnp.zeros(shape, wide(leaf.dtype))

    return map_paths(coordinate, params), Frame(kernels, columns, layout)
