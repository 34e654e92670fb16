"""How models meet shifted data: ours, and what others do, in one harness.

A method answers batch after batch and carries a state. None sees labels; those that
need batch normalisation say so.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import inference
from dsbp_jax.inference.inputs import arguments, movable, moved_pass
from dsbp_jax.layers import capture_activations, leaves_by_path, trace
from experiments import data
from experiments.data.dataset import Dataset

NORMALISED = ("batch_norm", "tent", "tent_reset")
_WITH_BATCH_NORM = ("resnet18", "conv4")
_SOURCE, _HELD, _BATCH = 6000, 2000, 200  # images, and at once
_LEAST = 4  # batches
_TENT_RATE, _TENT_RESET = 1e-3, 50  # batches
_SUPPORTS = 20  # of each class
_WIDEST = 256  # layers that are aligned at full rank


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A trained model.

    Attributes:
      fn: `fn(arrays, x)`, logits of normalised images, in evaluation mode.
      training: The same in training mode: with the batch's own statistics.
      arrays: A dict of `params` and `rest`.
      dataset: The images.
    """

    fn: Callable[[Any, Any], Any]
    training: Callable[[Any, Any], Any]
    arrays: Any
    dataset: Dataset


class Method(NamedTuple):
    """A way to answer a stream.

    Attributes:
      init: The state at its begin.
      step: `step(state, x)`, logits and the next state.
      says: From a state to what a report has of it.
    """

    init: Callable[[], Any]
    step: Callable[[Any, Any], tuple[Any, Any]]
    says: Callable[[Any], dict[str, Any]] = lambda state: {}


def check(name: str, model: str) -> None:
    """Raises a `ValueError` where a method cannot work with a model."""
    if name in NORMALISED and model not in _WITH_BATCH_NORM:
        raise ValueError(
            f"method={name!r} needs batch normalisation, model.name={model!r} has none"
        )


def build(name: str, model: Deployed) -> Method:
    """A method by its name."""
    return globals()[f"_{name}"](model)


def source_batches(model: Deployed) -> tuple[list[Any], list[Any]]:
    """Training images, and such as the model was not trained on, in batches.

    Of small sets batches are smaller, so that there are some.
    """

    def batches(split: Any, most: int) -> list[Any]:
        size = min(_BATCH, max(1, len(split) // _LEAST))
        return [
            data.normalize(split.images[at : at + size], model.dataset)
            for at in range(0, min(most, len(split) // size * size), size)
        ]

    dataset = model.dataset
    return batches(dataset.train, _SOURCE), batches(dataset.validation, _HELD)


def _none(model: Deployed) -> Method:
    run = jax.jit(model.fn)
    return Method(lambda: (), lambda state, x: (run(model.arrays, x), state))


def source_of(model: Deployed) -> inference.Source:
    """What `inference.fit` says of a model."""
    batches, held = source_batches(model)
    return inference.fit(model.fn, model.arrays, batches, held_out=held)


def spectral(model: Deployed, source: inference.Source) -> Method:
    """Ours, with a source that was fitted before."""
    step = jax.jit(
        lambda source, state, x: inference.adapt(
            model.fn, model.arrays, source, state, x
        )
    )

    def says(state: inference.State) -> dict[str, Any]:
        return {
            "adapted": bool(state.adapted),
            "alarm": bool(state.alarm),
            "score": float(state.score),
            "measures": np.asarray(state.measures).tolist(),
        }

    return Method(
        lambda: inference.init(source), lambda state, x: step(source, state, x), says
    )


def _spectral(model: Deployed) -> Method:
    return spectral(model, source_of(model))


def _batch_norm(model: Deployed) -> Method:
    run = jax.jit(model.training)
    return Method(lambda: (), lambda state, x: (run(model.arrays, x), state))


def _entropies(logits: jax.Array) -> jax.Array:
    """Those of the answers, in nats, shape `(n,)`."""
    logs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logs) * logs, axis=-1)


def _tent(model: Deployed, reset: int | None = None) -> Method:
    """Tent (Wang et al., 2021): scales and shifts of batch norm follow the entropy."""
    tx = optax.adam(_TENT_RATE)
    leaves = leaves_by_path(model.arrays["params"])
    moves = {
        path: leaf for path, leaf in leaves.items() if "norm" in path and leaf.ndim == 1
    }
    treedef = jax.tree.structure(model.arrays["params"])

    def answers(moved: Any, x: Any) -> Any:
        params = [moved.get(path, leaf) for path, leaf in leaves.items()]
        params = jax.tree.unflatten(treedef, params)
        return model.training({**model.arrays, "params": params}, x)

    def loss(moved: Any, x: Any) -> Any:
        logits = answers(moved, x)
        return _entropies(logits).mean(), logits

    def init() -> Any:
        return moves, tx.init(moves), jnp.int32(0)

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        if reset is not None:
            again = (state[2] > 0) & (state[2] % reset == 0)
            fresh = init()[:2]
            pick = lambda a, b: jnp.where(again, a, b)
            state = (*jax.tree.map(pick, fresh, state[:2]), state[2])
        moved, opt_state, count = state
        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(moved, x)
        updates, opt_state = tx.update(grads, opt_state)
        return logits, (optax.apply_updates(moved, updates), opt_state, count + 1)

    return Method(init, step)


def _tent_reset(model: Deployed) -> Method:
    return _tent(model, _TENT_RESET)


class Supports(NamedTuple):
    """Features of the surest answers of each class.

    Attributes:
      features: Shape `(classes, supports, d)`.
      entropies: Shape `(classes, supports)`; infinite where there is none.
    """

    features: jax.Array
    entropies: jax.Array

    def join(self, features: jax.Array, logits: jax.Array) -> "Supports":
        """With those of a batch, as many as fit."""
        entropies = _entropies(logits)
        classes, size = self.entropies.shape
        own = logits.argmax(-1) == jnp.arange(classes)[:, None]
        all_entropies = jnp.concatenate(
            [self.entropies, jnp.where(own, entropies, jnp.inf)], axis=1
        )
        spread = jnp.broadcast_to(features, (classes, *features.shape))
        all_features = jnp.concatenate([self.features, spread], axis=1)
        kept, index = jax.lax.top_k(-all_entropies, size)
        picked = jnp.take_along_axis(all_features, index[..., None], axis=1)
        return Supports(picked, -kept)


def _head(model: Deployed) -> tuple[Any, Any, Any]:
    """Kernel and bias of the last layer, and the model with its inputs."""
    params = model.arrays["params"]["head"]
    name = "params/head/kernel"
    seen = capture_activations(model.fn, which=("inputs",))

    def run(x: Any) -> tuple[Any, Any]:
        logits, activations = seen(model.arrays, x)
        return logits, activations[name].inputs

    return params["kernel"], params["bias"], run


def _t3a(model: Deployed) -> Method:
    """T3A (Iwasawa and Matsuo, 2021): class prototypes from sure answers.

    Its number of supports is not tuned.
    """
    kernel, _, run = _head(model)
    unit = lambda a, axis=-1: (
        a / jnp.maximum(jnp.linalg.norm(a, axis=axis, keepdims=True), 1e-12)
    )
    dim, classes = kernel.shape

    def init() -> Supports:
        shape = (classes, _SUPPORTS)
        return Supports(jnp.zeros((*shape, dim)), jnp.full(shape, jnp.inf))

    @jax.jit
    def step(state: Supports, x: Any) -> tuple[Any, Supports]:
        logits, features = run(x)
        state = state.join(features, logits)
        there = jnp.isfinite(state.entropies)[..., None]
        total = unit(kernel.T) + jnp.sum(unit(state.features) * there, axis=1)
        return features @ unit(total).T, state

    return Method(init, step)


class Aligned(NamedTuple):
    """Statistics of features, and the surest of them.

    Attributes:
      count: Images, at most a horizon.
      mean: Shape `(d,)`.
      second: Shape `(d, d)`, about zero.
      supports: The surest of each class.
    """

    count: jax.Array
    mean: jax.Array
    second: jax.Array
    supports: Supports


def _root(c: jax.Array, power: float) -> jax.Array:
    values, vectors = jnp.linalg.eigh(c)
    return (vectors * jnp.maximum(values, 1e-6) ** power) @ vectors.T


def _linear_tca(model: Deployed) -> Method:
    """LinearTCA (ICML 2025): features get the covariance of the surest of them."""
    kernel, bias, run = _head(model)
    dim, classes = kernel.shape

    def init() -> Aligned:
        shape = (classes, _SUPPORTS)
        supports = Supports(jnp.zeros((*shape, dim)), jnp.full(shape, jnp.inf))
        return Aligned(jnp.float32(0), jnp.zeros(dim), jnp.zeros((dim, dim)), supports)

    @jax.jit
    def step(state: Aligned, x: Any) -> tuple[Any, Aligned]:
        logits, features = run(x)
        size = len(features)
        weight = size / (size + state.count)
        mean = (1 - weight) * state.mean + weight * features.mean(axis=0)
        second = (1 - weight) * state.second + weight * features.T @ features / size
        supports = state.supports.join(features, logits)
        there = jnp.isfinite(supports.entropies).astype(features.dtype).ravel()
        sure = supports.features.reshape(-1, dim)
        number = jnp.maximum(there.sum(), 1)
        middle = there @ sure / number
        centred = (sure - middle) * there[:, None]
        ridge = 1e-2 * jnp.trace(second) / dim * jnp.eye(dim)
        wanted = centred.T @ centred / number + ridge
        own = second - jnp.outer(mean, mean) + ridge
        moved = middle + (features - mean) @ _root(own, -0.5) @ _root(wanted, 0.5)
        enough = number >= 2 * classes
        answer = jnp.where(enough, moved @ kernel + bias, logits)
        count = jnp.minimum(state.count + size, 10_000.0)
        return answer, Aligned(count, mean, second, supports)

    return Method(init, step)


def _full_rank(model: Deployed) -> Method:
    """Our map at full rank, of narrow layers; after PEA (ICLR 2026), which has another.

    Without an alarm and without a guard. Of layers that are much wider than a batch has
    rows the full covariance is mostly noise: with the 784 pixels before an MLP this
    rival loses to no adaptation, so it leaves such layers alone.
    """
    settings = inference.Settings(rank=_WIDEST)
    batches, held = source_batches(model)
    names = [
        site.name
        for site in movable(trace(model.fn, model.arrays, (batches[0],), {}))
        if np.prod([site.shape[a] for a in site.view.input_axes]) <= _WIDEST
    ]
    if not names:
        raise ValueError(
            f"method='full_rank' aligns layers up to {_WIDEST} wide; the model has none"
        )
    source = inference.fit(
        model.fn,
        model.arrays,
        batches,
        held_out=held,
        layers=names,
        settings=settings,
    )
    models = {name: source.models[name] for name in names}

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        before, count = state
        traced = trace(model.fn, model.arrays, (x,), {})
        logits, after = moved_pass(
            traced,
            arguments(model.arrays, x),
            models,
            before,
            len(x) / (len(x) + count),
            settings.rows,
            settings.limit,
        )
        return logits, (after, jnp.minimum(count + len(x), settings.horizon))

    return Method(lambda: (models, jnp.float32(settings.prior)), step)
