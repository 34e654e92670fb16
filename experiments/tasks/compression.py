"""A trained classifier, cut to a share of its FLOPs, and tuned after the cut."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import architecture
from experiments import data
from experiments.bench.timing import interleave
from experiments.compression_config import CompressionConfig
from experiments.compression_rivals import RIVALS, Smaller
from experiments.study.task import Length, Metric
from experiments.tasks import tuned
from experiments.tasks.whole import Whole

_PASSES = 30  # timed of each model, interleaved


class Small(NamedTuple):
    """A model on smaller leaves.

    Attributes:
      apply: From arrays and normalised images to logits.
      train: The same as it runs in training: logits and the new rest.
      arrays: Its parameters, and the rest that it needs.
      flops: The share of the whole model's.
      sums: From arrays, images and labels to `tuned.sums`; compiled.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    arrays: Any
    flops: float
    sums: Callable[..., jax.Array]


class TuneState(NamedTuple):
    """What tuning carries.

    Attributes:
      arrays: As `Small` has them; of them the parameters are trained.
      opt_state: Adam's.
      step: Steps done.  # shape=(), dtype=int32
      peak: Peak learning rate.  # shape=(), dtype=float32
    """

    arrays: Any
    opt_state: Any
    step: jax.Array
    peak: jax.Array


_WHOLE = Whole()


class CompressionTask(tuned.Tuned):
    """The `Task` of a `CompressionConfig`.

    Args:
      config: The experiment.

    Raises:
      ValueError: If model, optimizer or batch size do not fit.
    """

    def __init__(self, config: CompressionConfig):
        self.config = config
        self.images = _WHOLE.task(config.trained())
        self.dataset = self.images.dataset
        self._small: dict[int, Small] = {}
        self._first: dict[str, float] = {}  # of that one, before it is tuned
        self._steps: dict[tuple[int, int], Callable[..., Any]] = {}
        classes, examples = self.dataset.num_classes, len(self.dataset.test)
        right = Metric("%", 1 / classes, 100.0, True, 2, True, examples)
        measured = functools.partial(Metric, "of the whole", math.inf, chooses=False)
        self.metrics = {
            "accuracy": right,
            "loss": Metric("nats", math.log(classes), digits=4),
            "before": right._replace(chooses=False),
            "flops": measured(digits=3),
            "latency": measured(digits=2),
        }

    def length(self, config: CompressionConfig) -> Length:
        """See `study.task.Task`."""
        steps = config.steps or round(self.images.per_epoch * config.tune_epochs)
        return Length(max(1, steps), max(1, steps))

    def logits(self, arrays: Any, images: jax.Array, *, mode: str) -> Any:
        """Logits of the whole model, of normalised images, and the rest after them."""
        params, rest = arrays["params"], arrays["rest"]
        return self.images.classifier.logits(params, rest, images, mode=mode)

    def apply(self, arrays: Any, images: jax.Array) -> jax.Array:
        """Logits of the whole model at inference."""
        return self.logits(arrays, images, mode="eval")[0]

    def seen(self) -> list[jax.Array]:
        """Training images whose activations are looked at."""
        count = min(self.config.images, len(self.dataset.train))
        parts = [
            self.dataset.train.images[start : min(start + tuned.AT_ONCE, count)]
            for start in range(0, count, tuned.AT_ONCE)
        ]
        return [data.normalize(part, self.dataset) for part in parts]

    def small(self, config: CompressionConfig) -> Small:
        """The model after the cut, before it is tuned."""
        if config.seed not in self._small:
            arrays = jax.tree.map(jnp.asarray, _WHOLE.arrays(config.trained()))
            self._small, self._first = {config.seed: self._cut(config, arrays)}, {}
        return self._small[config.seed]

    def _cut(self, config: CompressionConfig, arrays: Any) -> Small:
        batches = self.seen()
        options = {"flops": config.flops, "multiple_of": config.multiple_of}
        found = Smaller(lambda fn: fn, arrays, 1.0)
        if config.method == "spectral":
            plan = architecture.plan(self.apply, arrays, batches, **options)
            small = architecture.compress(self.apply, arrays, plan)
            resized = lambda fn: architecture.resized(fn, arrays, plan.cuts)
            found = Smaller(resized, small.params, plan.flops)
        elif config.method in RIVALS:
            found = RIVALS[config.method](
                self.apply, arrays, batches, *options.values(), config.seed
            )
        apply = found.resized(self.apply)
        train = found.resized(functools.partial(self.logits, mode="train"))
        if config.method != "whole":
            found = found._replace(arrays=settled(train, found.arrays, batches))

        @jax.jit
        def sums(arrays: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
            logits = apply(arrays, data.normalize(images, self.dataset))
            return tuned.sums(logits, labels)

        return Small(apply, train, found.arrays, found.flops, sums)

    def init(self, config: CompressionConfig) -> TuneState:
        """See `study.task.Task`."""
        arrays = jax.tree.map(jnp.array, self.small(config).arrays)
        opt_state = optax.scale_by_adam().init(arrays["params"])
        peak = jnp.float32(config.tune_rate)
        return TuneState(arrays, opt_state, jnp.int32(0), peak)

    def _stepper(self, config: CompressionConfig) -> Callable[..., Any]:
        """The compiled step of a seed and a length."""
        small, steps = self.small(config), self.length(config).steps
        key = config.seed, steps
        if key in self._steps:
            return self._steps[key]
        schedule = tuned.schedule(steps)

        def step(state: TuneState, images: jax.Array, labels: jax.Array) -> Any:
            def loss_fn(params):
                arrays = {**state.arrays, "params": params}
                logits, rest = small.train(arrays, data.normalize(images, self.dataset))
                return tuned.entropies(logits, labels).mean(), rest

            (value, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.arrays["params"]
            )
            params, opt_state = tuned.descend(
                state.arrays["params"],
                grads,
                state.opt_state,
                state.peak * schedule(state.step),
            )
            arrays = {"params": params, "rest": rest}
            new = TuneState(arrays, opt_state, state.step + 1, state.peak)
            return new, {"loss": value}

        self._steps = {key: jax.jit(step, donate_argnums=0)}
        return self._steps[key]

    def step(
        self, state: TuneState, config: CompressionConfig, number: int
    ) -> tuple[TuneState, dict[str, jax.Array]]:
        """See `study.task.Task`."""
        batch = self.images.batch(config.trained(), number)
        return self._stepper(config)(state, *batch)

    def _measured(self, small: Small, arrays: Any, part: str) -> list[float]:
        """Means of loss and right answers over a split."""
        sums = functools.partial(small.sums, arrays)
        return tuned.means(sums, getattr(self.dataset, part))

    def latency(self, config: CompressionConfig, small: Small, arrays: Any) -> float:
        """Median seconds of a pass over those of the whole model's."""
        index = np.arange(config.timed_batch) % len(self.dataset.train)
        x = data.normalize(self.dataset.train.images[index], self.dataset)
        whole = jax.tree.map(jnp.asarray, _WHOLE.arrays(config.trained()))
        passes = {
            "whole": functools.partial(jax.jit(self.apply), whole, x),
            "small": functools.partial(jax.jit(small.apply), arrays, x),
        }
        times = interleave(passes, _PASSES)
        return float(np.median(times["small"]) / np.median(times["whole"]))

    def evaluate(
        self, state: TuneState, part: str, config: CompressionConfig
    ) -> dict[str, float]:
        """See `study.task.Task`; `before` is the accuracy before tuning."""
        small = self.small(config)
        loss, accuracy = self._measured(small, state.arrays, part)
        if part not in self._first:
            _, self._first[part] = self._measured(small, small.arrays, part)
        if "latency" not in self._first:
            self._first["latency"] = self.latency(config, small, small.arrays)
        return {
            "accuracy": accuracy,
            "loss": loss,
            "before": self._first[part],
            "flops": small.flops,
            "latency": self._first["latency"],
        }


def settled(
    train: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    arrays: Any,
    batches: Sequence[jax.Array],
) -> Any:
    """A model with the statistics that batch normalisation has of it.

    A cut model's activations are not those of the whole: their means and variances are
    taken again from images, without labels or gradients. They are running means, begun
    here at zero: the first pass over the batches leaves s₁, the second s₂, and all
    further ones would lead to `s₁/(2 − s₂/s₁)`, the ratio that of norms.

    Args:
      train: As `Small` has it.
      arrays: Its parameters, and the rest.
      batches: Normalised images; all but a smaller last one are looked at.

    Returns:
      The arrays, with other statistics; what no batch moves stays as it was.
    """
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    rest = arrays["rest"]
    if not any(map(floating, jax.tree.leaves(rest))):
        return arrays
    begun = jax.tree.map(lambda a: jnp.zeros_like(a) if floating(a) else a, rest)
    follow = jax.jit(lambda arrays, x: {**arrays, "rest": train(arrays, x)[1]})
    whole = [x for x in batches if len(x) == len(batches[0])]
    once = functools.reduce(follow, whole, {**arrays, "rest": begun})
    twice = functools.reduce(follow, whole, once)

    def led_to(old: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        if not floating(old):
            return old
        r1, r2 = jnp.linalg.norm(first), jnp.linalg.norm(second)
        far = r1 / jnp.maximum(2 * r1 - r2, jnp.finfo(r1.dtype).tiny)
        return jnp.where(r1 > 0, far * first, old).astype(old.dtype)

    return {**arrays, "rest": jax.tree.map(led_to, rest, once["rest"], twice["rest"])}
