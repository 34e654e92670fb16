"""A trained classifier, tuned for another task of few labels.

Each task has its head: what is kept of the source is its accuracy under its own head,
which is frozen.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import data
from experiments.config import DataConfig
from experiments.study.task import Length, Metric
from experiments.tasks import tuned
from experiments.tasks.images import Classifier, load_data
from experiments.tasks.whole import Whole
from experiments.transfer_config import TransferConfig
from experiments.transfer_methods import HEAD, KINDS, Origin


def _first_half(config: DataConfig) -> data.Dataset:
    whole = load_data(config)
    return data.with_classes(whole, 0, whole.num_classes // 2)


_HALVES, _WHOLES = Whole(_first_half), Whole()


class TuneState(NamedTuple):
    """What tuning carries.

    Attributes:
      trained: What is trained.
      held: What its method holds fixed beside it.
      source: The source's head, and the rest of the model's state.
      opt_state: Adam's.
      step: Steps done.  # shape=(), dtype=int32
      peak: Peak learning rate.  # shape=(), dtype=float32
    """

    trained: Any
    held: Any
    source: Any
    opt_state: Any
    step: jax.Array
    peak: jax.Array


class TransferTask(tuned.Tuned):
    """The `Task` of a `TransferConfig`.

    Args:
      config: The experiment.

    Raises:
      ValueError: If data, model or labels do not fit.
    """

    def __init__(self, config: TransferConfig):
        self.config = config
        self.wholes = _WHOLES if config.target else _HALVES
        self.images = self.wholes.task(config.trained())
        self.source = self.images.dataset
        self.target = self._target()
        if self.target.image_shape != self.source.image_shape:
            raise ValueError(
                f"target={config.target!r} has images of {self.target.image_shape}; "
                f"accepted are those of {self.source.image_shape}, the source's"
            )
        data.few(self.target.train, config.labels, seed=0)
        self.classifiers = {
            "target": Classifier(self.target, config.model),
            "source": self.images.classifier,
        }
        self.method = KINDS[config.method](config, self.apply, self.answer)
        self._steps: dict[int, Callable[..., Any]] = {}
        self.labelled = functools.cache(self._labelled)
        self.kept = functools.cache(self._kept)
        self._sums = jax.jit(self._sums_of, static_argnames="which")
        right = functools.partial(Metric, "%", scale=100.0, digits=2, higher=True)
        self.metrics = {
            "accuracy": right(
                1 / self.target.num_classes, examples=len(self.target.test)
            ),
            "kept": right(
                1 / self.source.num_classes,
                chooses=False,
                examples=len(self.source.test),
            ),
            "loss": Metric("nats", math.log(self.target.num_classes), digits=4),
            "trained": Metric("numbers", math.inf, chooses=False, digits=0),
        }

    def _target(self) -> data.Dataset:
        config = self.config
        if config.target:
            return data.load(
                config.target,
                data_dir=config.data.data_dir,
                download=config.data.download,
                seed=config.data.split_seed,
            )
        whole = load_data(config.data)
        return data.with_classes(whole, whole.num_classes // 2, whole.num_classes)

    def length(self, config: TransferConfig) -> Length:
        """See `study.task.Task`."""
        steps = config.steps or config.tune_steps
        return Length(steps, steps)

    def normalized(self, images: Any) -> jax.Array:
        """Images as the source model is used to them."""
        return data.normalize(images, self.source)

    def apply(self, params: Any, rest: Any, x: jax.Array) -> jax.Array:
        """Logits of the target's head."""
        return self.classifiers["target"].logits(params, rest, x, mode="eval")[0]

    def answer(self, params: Any, rest: Any, x: jax.Array) -> jax.Array:
        """Those of the source's."""
        return self.classifiers["source"].logits(params, rest, x, mode="eval")[0]

    def _labelled(self, seed: int) -> data.Split:
        """The target's images that have labels."""
        return data.few(self.target.train, self.config.labels, seed=seed)

    def _kept(self, seed: int) -> data.Split:
        """The source's images that replay keeps."""
        train = self.source.train
        count = max(self.source.num_classes, round(self.config.share * len(train)))
        return data.few(train, count, seed=seed)

    def init(self, config: TransferConfig) -> TuneState:
        """See `study.task.Task`."""
        own = functools.partial(jax.tree.map, jnp.array)
        arrays = own(self.wholes.arrays(config.trained()))
        fresh, _ = self.classifiers["target"].init(config.seed + 1)
        seen = self.source.train.images[: config.images]
        origin = Origin(
            params={**arrays["params"], HEAD: fresh[HEAD]},
            trained=arrays["params"],
            rest=arrays["rest"],
            seen=self.normalized(seen),
            target=self.normalized(self.labelled(config.seed).images),
            key=jax.random.key(config.seed),
        )
        trained, held = self.method.start(origin)
        source = {HEAD: arrays["params"][HEAD], "rest": arrays["rest"]}
        # Buffers of its own each: the state is donated.
        return TuneState(
            own(trained),
            own(held),
            own(source),
            optax.scale_by_adam().init(trained),
            jnp.int32(0),
            jnp.float32(config.tune_rate),
        )

    def stepper(self, steps: int) -> Callable[..., Any]:
        """The compiled step of a length: of state, batch and replayed images."""
        if steps in self._steps:
            return self._steps[steps]
        schedule, method = tuned.schedule(steps), self.method
        entropy = lambda logits, labels: tuned.entropies(logits, labels).mean()

        def step(state: TuneState, batch: Any, replayed: Any) -> Any:
            rest = state.source["rest"]

            def loss_fn(trained):
                images, labels = batch
                x = self.normalized(images)
                logits = method.logits(trained, state.held, rest, x)
                value = entropy(logits, labels)
                total = value + method.penalty(trained, state.held)
                if replayed is not None:
                    images, labels = replayed
                    params = self._source_params(state._replace(trained=trained))
                    logits = self.answer(params, rest, self.normalized(images))
                    total += entropy(logits, labels)
                return total, value

            return tuned.stepped(
                state,
                loss_fn,
                state.peak * schedule(state.step),
                lambda updates: method.restrict(updates, state.held),
            )

        self._steps = {steps: jax.jit(step, donate_argnums=0)}
        return self._steps[steps]

    def step(
        self, state: TuneState, config: TransferConfig, number: int
    ) -> tuple[TuneState, dict[str, jax.Array]]:
        """See `study.task.Task`."""
        draw = lambda split: tuned.drawn(split, config.tune_batch, config.seed, number)
        batch = draw(self.labelled(config.seed))
        replayed = draw(self.kept(config.seed)) if self.method.replayed() else None
        return self.stepper(self.length(config).steps)(state, batch, replayed)

    def _source_params(self, state: TuneState) -> Any:
        """The body as it is now, under the source's head."""
        params = self.method.params(state.trained, state.held)
        return {**params, HEAD: state.source[HEAD]}

    def _sums_of(self, params, rest, images, labels, which: str) -> jax.Array:
        answer = self.apply if which == "target" else self.answer
        return tuned.sums(answer(params, rest, self.normalized(images)), labels)

    def _measured(self, params: Any, rest: Any, part: str, which: str) -> list[float]:
        """Means of loss and right answers over a split."""
        sums = functools.partial(self._sums, params, rest, which=which)
        dataset = self.target if which == "target" else self.source
        return tuned.means(sums, getattr(dataset, part))

    def evaluate(
        self, state: TuneState, part: str, config: TransferConfig
    ) -> dict[str, float]:
        """See `study.task.Task`; `kept` is the accuracy on the source."""
        del config
        rest = state.source["rest"]
        params = self.method.params(state.trained, state.held)
        loss, accuracy = self._measured(params, rest, part, "target")
        _, kept = self._measured(self._source_params(state), rest, part, "source")
        count = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
        return {"accuracy": accuracy, "kept": kept, "loss": loss, "trained": count}
