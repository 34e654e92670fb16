"""Low-rank adapters: kernels `W + AB` of any model, that start in an eigenspace."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.backprop import kernel_sum, other_uses, thin_uses, with_taps
from dsbp_jax.layers import (
    Layout,
    Product,
    Site,
    Trace,
    array_leaves,
    evaluate,
    leaves_by_path,
    map_paths,
    require_paths,
    trace,
)
from dsbp_jax.ownership import own
from dsbp_jax.tracking import Eigenspace, Spaces, labelled, wide
from dsbp_jax.transfer.starts import (
    STARTS,
    explained_columns,
    random_columns,
    share_out,
)


class Adapter(NamedTuple):
    """What is trained of one leaf: the factors of `AB`.

    Attributes:
      down: A, shape `(*batch, d_in, rank)`; None where it is not trained.
      up: B, shape `(*batch, [window,] rank, d_out)`, zero at the start.
    """

    down: jax.Array | None
    up: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterFrame:
    """What the adapters stand on; never changes.

    Attributes:
      params: The parameters W.
      down: Canonical path to A, where it is not trained.
      layout: The matrix view of every leaf with an adapter; static.
    """

    params: Any
    down: dict[str, jax.Array]
    layout: Layout = dataclasses.field(metadata={"static": True})


class SpectralLora(NamedTuple):
    """Low-rank adapters as three pure functions.

    Attributes:
      init: `init(params, *args, key=key, **kwargs) -> (adapters, frame)`; the other
        arguments are those of the function, a batch of the data to come. Adapters are a
        dict from canonical path to `Adapter`, and to the leaf itself for each of
        `whole`. Where ranks are shared out it can't be jitted.
      apply: `apply(adapters, frame, *args, **kwargs)`, the function with `W + AB`.
      merge: `merge(adapters, frame) -> params`, ordinary ones of the same shapes.
    """

    init: Callable[..., tuple[dict[str, Any], AdapterFrame]]
    apply: Callable[..., Any]
    merge: Callable[[dict[str, Any], AdapterFrame], Any]


def spectral_lora(
    fn: Callable[..., Any],
    rank: int = 8,
    *,
    start: str = "explained",
    train: str = "both",
    budget: int | None = None,
    source_bases: Spaces | None = None,
    whole: Iterable[str] = (),
) -> SpectralLora:
    """Trains a model through `W + AB`, with A started in a spectral basis.

    W is frozen; A has `rank` orthonormal columns on the layer's input side and B begins
    at zero, so that training begins at the model that was given. Any leaf that
    `dsbp_jax.layout` finds has an adapter. Where every use of it is a plain product, it
    answers `xW + (xA)B` and its weight gradient is never formed; elsewhere (fused or
    tied kernels, custom derivatives) W + AB is.

    Relation to `dsbp_jax.spectral_coordinates`: the same `W + VS`, by the same
    rewriting. There V is refreshed and S folded into W again and again, so that the
    whole kernel moves in the end; here one subspace of small rank is chosen, and may
    itself be trained, so that what was learned stays small and apart.

    Where A starts:

    - `"explained"`: the leading eigenvectors of the covariance of the layer's inputs on
      the batch of `init` (EVA): of the data to come.
    - `"null"`: the same, outside of the source task's eigenspaces. As long as A is not
      trained, answers to source inputs inside of those do not change.
    - `"random"`: random orthonormal columns, as LoRA.

    Args:
      fn: `fn(params, *args, **kwargs)`, anything that the layer finder understands.
      rank: Columns of A. A layer with fewer dimensions (outside of the source's
        eigenspace) gets as many as it has.
      start: One of the above.
      train: `"both"` factors, or `"output"`: B only.
      budget: Trainable numbers of all adapters; ranks then differ. Columns are taken by
        the share of the layer's variance that they explain for each of their numbers,
        at most `rank` of a layer.
      source_bases: Of `"null"`: input-side eigenspaces as `activation_bases` gives them
        on source data. Leaves without one are free.
      whole: Canonical paths of leaves that are trained themselves and have no adapter:
        a new head.

    Returns:
      Three functions.

    Raises:
      ValueError: An argument is out of its range. In `init`: no leaf gets an adapter,
        the budget is too small, bases do not fit, or `whole` names no leaf.

    References:
      [P] Hu et al., LoRA, ICLR 2022; Paischer et al., EVA, 2024 (arXiv 2410.07170), for
      the start and ranks that differ; Tang et al., LoRA-Null, 2025 (arXiv 2503.02659),
      for the complement, there the last eigenvectors of the source.
      [O] The target's variance outside of the source's eigenspace, and the budget in
      numbers: METHODS section 7.

    Example:
      >>> model = lambda params, x: jnp.tanh(x @ params["body"]) @ params["head"]
      >>> params = {"body": jnp.ones((16, 12)) / 16, "head": jnp.ones((12, 3))}
      >>> x = jax.random.normal(jax.random.key(0), (40, 16))
      >>> lora = spectral_lora(model, rank=2, whole=("head",))
      >>> adapters, frame = lora.init(params, x, key=jax.random.key(1))
      >>> jax.tree.map(jnp.shape, adapters)
      {'body': Adapter(down=(16, 2), up=(2, 12)), 'head': (12, 3)}
      >>> bool((lora.apply(adapters, frame, x) == model(params, x)).all())
      True
      >>> lora.merge(adapters, frame)["body"].shape
      (16, 12)
    """
    rank = checks.positive_int("rank", rank)
    checks.one_of("start", start, STARTS)
    checks.one_of("train", train, ("both", "output"))
    if budget is not None:
        budget = checks.positive_int("budget", budget)
    if budget is not None and start == "random":
        raise ValueError(
            "budget must be None with start='random', which knows no layer from "
            f"another, got {budget}"
        )
    if (source_bases is not None) != (start == "null"):
        raise ValueError(
            "source_bases must be given with start='null', and with no other, got "
            f"{'some' if source_bases is not None else None} with start={start!r}"
        )
    if isinstance(whole, str):
        raise ValueError(f"whole must be a collection of paths, got {whole!r}")
    heads = tuple(whole)

    def init(
        params: Any, *args: Any, key: jax.Array, **kwargs: Any
    ) -> tuple[dict[str, Any], AdapterFrame]:
        leaves = leaves_by_path(params)
        require_paths(heads, leaves, "params")
        traced = trace(fn, params, args, kwargs)
        layout = Layout(
            (site.path, site.view)
            for site in traced.sites
            if site.name == site.path and site.has_gradient and site.path not in heads
        )
        spaces = _spaces(params, source_bases, layout)
        shapes = {
            path: view.matrix_shape(leaves[path].shape) for path, view in layout.items()
        }
        taken = {path: space.rank for path, space in spaces.items()}
        ranks = {p: min(rank, s[-2] - taken.get(p, 0)) for p, s in shapes.items()}
        ranks = {path: most for path, most in ranks.items() if most > 0}
        if not ranks:
            raise ValueError(
                "params must hold the weights of a layer in fn that is not whole and "
                f"has dimensions left, got {len(leaves)} leaves without; "
                "dsbp_jax.explain(fn, params, *args) says more"
            )
        if start == "random":
            columns = random_columns(shapes, ranks, key)
        else:
            arrays = array_leaves((params, args, kwargs))
            columns, shares = explained_columns(traced, arrays, layout, spaces, ranks)
            if budget is not None:
                costs = {path: _numbers(shapes[path], train) for path in ranks}
                ranks = share_out(jax.device_get(shares), costs, budget)
        adapters: dict[str, Any] = {path: leaves[path] for path in heads}
        down = {}
        for path, number in ranks.items():
            *batch, window, _, d_out = shapes[path]
            dtype = wide(leaves[path].dtype)
            first = columns[path][..., :number].astype(dtype)
            shape = (*batch, *((window,) if window > 1 else ()), number, d_out)
            adapters[path] = Adapter(
                first if train == "both" else None, jnp.zeros(shape, dtype)
            )
            if train == "output":
                down[path] = first
        views = Layout((path, layout[path]) for path in ranks)
        return own(adapters), AdapterFrame(own(params), down, views)

    def apply(
        adapters: dict[str, Any], frame: AdapterFrame, *args: Any, **kwargs: Any
    ) -> Any:
        traced = trace(fn, frame.params, args, kwargs)
        sites = _plain_uses(traced, frame.layout)
        apart = {site.path for site in sites.values()}
        params = _merged(adapters, frame, apart)

        def visit(
            product: Product, x: jax.Array, w: jax.Array, extra: Any
        ) -> tuple[jax.Array, None]:
            first, second = extra
            small = product.operand(second).astype(w.dtype)
            return product(x, w) + product.expand(product.compress(x, first), small), (
                None
            )

        extras = {}
        for name, site in sites.items():
            first, second = _factors(adapters, frame, site.path)
            extras[name] = first, with_taps(second, first)
        values = array_leaves((params, args, kwargs))
        outputs, _ = evaluate(traced, visit, values, extras, sites=sites.values())
        return traced.unflatten(outputs)

    def merge(adapters: dict[str, Any], frame: AdapterFrame) -> Any:
        return own(_merged(adapters, frame, ()))

    return SpectralLora(init, apply, merge)


def _spaces(
    params: Any, source_bases: Spaces | None, layout: Layout
) -> dict[str, Eigenspace]:
    """The source's eigenspaces of the leaves with adapters."""
    if source_bases is None:
        return {}
    found = labelled("source_bases", source_bases, params, layout, need="input")
    return {path: own[0] for path, own in found.items() if path in layout}


def _numbers(shape: tuple[int, ...], train: str) -> int:
    """What one column of an adapter trains."""
    *batch, window, d_in, d_out = shape
    return math.prod(batch) * (window * d_out + (d_in if train == "both" else 0))


def _plain_uses(traced: Trace, layout: Layout) -> dict[str, Site]:
    """The uses of leaves all of whose uses are products that can be taken apart."""
    found = thin_uses(traced, layout)
    found = {name: site for name, site in found.items() if not site.fused}
    elsewhere = other_uses(traced, found)
    return {name: site for name, site in found.items() if site.path not in elsewhere}


def _factors(
    adapters: dict[str, Any], frame: AdapterFrame, path: str
) -> tuple[jax.Array, jax.Array]:
    """A and B of one leaf."""
    down, up = adapters[path]
    return (frame.down[path] if down is None else down), up


def _merged(adapters: dict[str, Any], frame: AdapterFrame, apart: Iterable[str]) -> Any:
    """`W + AB` where there is an adapter, but for some leaves."""

    def leaf(path: str, kernel: Any) -> Any:
        if path in frame.layout:
            if path in apart:
                return kernel
            view, (down, up) = frame.layout[path], _factors(adapters, frame, path)
            return kernel_sum(kernel, up, down, view)
        return adapters.get(path, kernel)

    return map_paths(leaf, frame.params)
