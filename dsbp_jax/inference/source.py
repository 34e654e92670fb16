"""What is kept of the source: models of layers' inputs, and what is usual there."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.inference import guard, selection
from dsbp_jax.inference.inputs import (
    Models,
    arguments,
    canonical,
    finite,
    movable,
    watched_pass,
)
from dsbp_jax.inference.measures import of_layers, score_of
from dsbp_jax.inference.settings import Settings
from dsbp_jax.layers import Trace, trace
from dsbp_jax.linalg import Spiked, init_basis

_HELD_OUT = 4  # one batch of so many, where none are given apart
_LEAST_HELD_OUT = 3  # that say what is usual, and how far that varies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """An ordinary pytree: of each layer a mean, and `rank` directions of its inputs.

    Attributes:
      models: Of the inputs of all layers that are watched or moved, by canonical path.
      normal: Mean and deviation of the measures of drift on source batches.
        # shape=(2, watched, 3), dtype=float32
      threshold: Of the score of drift.  # shape=(), dtype=float32
      classes: Mean class probabilities; empty where outputs are no logits.
        # shape=(classes,), dtype=float32
      entropy: Mean entropy of the outputs, as a share of the logarithm of the number of
        classes; NaN where they are no logits.  # shape=(), dtype=float32
      watched: The layers whose drift is followed; static.
      moved: Those whose inputs are moved; static.
      probed: Images of which drift is measured at a time, at least; static.
      shape: Of one example; static.
      dtype: Of examples; static.
      leaves: Path, shape and dtype of each parameter; static.
      settings: Static.
    """

    models: Models
    normal: jax.Array
    threshold: jax.Array
    classes: jax.Array
    entropy: jax.Array
    watched: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    moved: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    probed: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    leaves: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    settings: Settings = dataclasses.field(metadata={"static": True})


def fit(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    layers: Sequence[str] | None = None,
    logits: bool | None = None,
    settings: Settings | None = None,
) -> Source:
    """One pass over source data: what each layer meets, and what is usual there.

    Which layers are moved is chosen on held-out batches under four shifts
    (`shifts.SHIFTS`): from the input on, each whose inputs, moved back, bring the
    outputs nearer to what they are without the shift.

    Args:
      fn: The model `fn(params, x)`, as it is deployed; a batch's examples along the
        first axis of x and of the outputs.
      params: All arrays that it needs, running statistics too.
      batches: An iterable of x; the shapes of their examples are one.
      held_out: At least three batches that the model was not trained on, for the
        threshold and the choice; by default every fourth of `batches`, which are then
        at least nine, is left out of the models. Drift is measured of as many images
        at a time as the probe of the largest has; where a stream's batches are
        smaller, they are gathered.
      layers: The layers to move, by canonical path, in place of a choice; `()` for
        none, where drift alone is wanted.
      logits: Whether outputs are logits `(n, classes)`; by default whether they have
        that shape.
      settings: By default those of `Settings`.

    Returns:
      The source.

    Raises:
      ValueError: There are too few batches, their shapes differ, no layer can be
        watched, or an argument is not accepted.

    References:
      [O] METHODS section 11.

    Example:
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.eye(3), "down": jnp.ones((3, 2))}
      >>> x = jax.random.normal(jax.random.key(0), (12, 20, 3))
      >>> source = fit(fn, params, list(x))
      >>> source.watched, source.classes.shape
      (('up', 'down'), (2,))
    """
    settings = settings or Settings()
    rest = [canonical(x) for x in batches]
    if held_out is None:
        _at_least("batches", rest, _HELD_OUT * (_LEAST_HELD_OUT - 1) + 1)
        apart = rest[::_HELD_OUT]
        rest = [x for at, x in enumerate(rest) if at % _HELD_OUT]
    else:
        apart = [canonical(x) for x in held_out]
        _at_least("batches", rest, 1)
        _at_least("held_out", apart, _LEAST_HELD_OUT)
    first = rest[0]
    shapes = {(tuple(x.shape[1:]), str(x.dtype)) for x in (*rest, *apart)}
    if len(shapes) > 1 or not first.ndim:
        raise ValueError(f"batches must be of one shape and dtype, got {shapes}")
    traced = trace(fn, params, (first,), {})
    classes = _classes(traced, len(first), logits)
    sites = movable(traced)
    if not sites:
        raise ValueError(
            f"params match no layer: none of {len(traced.leaves)} array leaves is met "
            "once, by an array of its own; dsbp_jax.explain(fn, params, x) says why"
        )
    names = [site.name for site in sites]
    for name in layers or ():
        if name not in names:
            raise ValueError(f"layers must be among {', '.join(names)}, got {name!r}")
    passes = Passes(fn, params, settings)
    models = {site.name: _unknown(site, settings.rank) for site in sites}
    seen = 0
    for x in rest:
        seen += len(x)
        _, models = passes.watched(x, models, len(x) / seen)
    watched = names
    if len(names) > settings.watched:
        at = np.linspace(0, len(names) - 1, settings.watched)
        watched = [names[i] for i in sorted({round(place) for place in at})]
    probes = [x[:: settings.stride(len(x))] for x in apart]
    normal, threshold = _usual(passes, models, watched, probes, settings)
    moved = list(layers or ())
    if layers is None:
        moved = selection.choose(
            fn,
            params,
            models,
            names,
            apart[0],
            passes.plain(apart[0]),
            classes > 0,
            settings,
        )
    mean, entropy = jnp.zeros(0), jnp.float32(math.nan)
    if classes:
        found = [guard.probabilities(passes.plain(x)) for x in apart]
        mean = jnp.mean(jnp.concatenate(found), axis=0)
        entropy = jnp.mean(guard.entropy(jnp.concatenate(found)))
    return Source(
        {name: models[name] for name in names if name in {*watched, *moved}},
        normal,
        threshold,
        mean,
        entropy,
        tuple(watched),
        tuple(name for name in names if name in moved),
        max(map(len, probes)),
        tuple(first.shape[1:]),
        str(first.dtype),
        leaves_of(traced),
        settings,
    )


def leaves_of(traced: Trace) -> tuple[Any, ...]:
    """What a model is told by: its parameters' paths, shapes and dtypes."""
    return tuple(
        (path, tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in traced.leaves.items()
    )


class Passes:
    """Compiled passes over batches of source data."""

    def __init__(self, fn: Callable[[Any, Any], Any], params: Any, settings: Settings):
        self.params = params
        self.plain = functools.partial(jax.jit(fn), params)
        self._limit = settings.rows
        self._fn = fn
        self._watched = jax.jit(self._pass)

    def _pass(self, params: Any, x: Any, models: Models, weight: Any) -> Any:
        traced = trace(self._fn, params, (x,), {})
        return watched_pass(traced, arguments(params, x), models, weight, self._limit)

    def watched(self, x: Any, models: Models, weight: float) -> tuple[Any, Models]:
        """Outputs, and models with that batch."""
        if not bool(finite([jnp.asarray(x)])):
            raise ValueError("batches must be finite, got one that is not")
        return self._watched(self.params, x, models, jnp.float32(weight))


def _at_least(name: str, batches: Sequence[Any], least: int) -> None:
    if len(batches) < least:
        raise ValueError(
            f"{name} must hold at least {least} batches (smaller ones serve too), got "
            f"{len(batches)}"
        )


def _classes(traced: Trace, images: int, logits: bool | None) -> int:
    """The number of classes, or 0 where outputs are no logits."""
    leaves = jax.tree.leaves(traced.out)
    if any(not leaf.shape or leaf.shape[0] != images for leaf in leaves):
        raise ValueError(
            f"fn must return arrays with the {images} examples along their first axis, "
            f"got {[leaf.shape for leaf in leaves]}"
        )
    alone = len(leaves) == 1 and len(leaves[0].shape) == 2 and leaves[0].shape[1] > 1
    able = alone and jnp.issubdtype(leaves[0].dtype, jnp.floating)
    if logits and not able:
        raise ValueError(
            "logits=True needs one floating-point output (n, classes), got "
            f"{[leaf.shape for leaf in leaves]}"
        )
    return leaves[0].shape[1] if able and logits is not False else 0


def _unknown(site: Any, rank: int) -> Spiked:
    """A model of no data."""
    dim = site.view.matrix_shape(site.shape)[-2]
    basis = init_basis(dim, min(rank, dim), key=jax.random.key(0))
    spread = lambda leaf: jnp.broadcast_to(leaf, (*site.batch_shape, *leaf.shape))
    return jax.tree.map(spread, Spiked(jnp.zeros(dim, jnp.float32), basis))


def _usual(
    passes: Passes,
    models: Models,
    watched: Sequence[str],
    probes: Sequence[Any],
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of the measures on source batches, and the threshold.

    As a stream sees them: in a row, from the source's models on, and each by itself.
    What is measured on a probe is scored by what all others say is usual.
    """
    source = {name: models[name] for name in watched}
    look = jax.jit(lambda found: of_layers(source, found, watched))
    found, owner = [], []
    tracked, seen = source, settings.prior
    for at, probe in enumerate(probes):
        images = len(probe)
        _, tracked = passes.watched(probe, tracked, images / (images + seen))
        found.append(look(tracked))
        owner.append(at)
        if at:  # the first one's row begins at the source
            prior = settings.prior
            _, alone = passes.watched(probe, source, images / (images + prior))
            found.append(look(alone))
            owner.append(at)
        seen = min(seen + images, settings.horizon / settings.probe)
    every = np.stack(found)
    usual = lambda rows: np.stack([rows.mean(axis=0), rows.std(axis=0, ddof=1)])
    others = lambda at: every[np.array(owner) != at]
    scores = np.array(
        [
            score_of(jnp.asarray(one), jnp.asarray(usual(others(at))))
            for at, one in zip(owner, every, strict=True)
        ]
    )
    beyond = statistics.NormalDist().inv_cdf(1 - settings.false_alarms)
    threshold = max(scores.mean() + beyond * scores.std(ddof=1), scores.max())
    return jnp.asarray(usual(every)), jnp.float32(threshold)
