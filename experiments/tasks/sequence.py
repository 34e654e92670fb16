"""Tasks in turn: a classifier learns one after the other, each with its head.

What counts is how well it does on all of them when the last is learned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments.data.dataset import channel_statistics
from experiments.data.fewshot import OMNIGLOT
from experiments.sequence_config import SequenceConfig
from experiments.study.task import Length, Metric
from experiments.tasks import tuned
from experiments.tasks.images import Classifier, load_data
from experiments.transfer_methods import HEAD, KINDS, Origin, blank

CHARACTERS = 20  # of an alphabet; smaller ones are left out
_HELD = 3  # drawings of a character for validation, and as many for test


class SequenceState(NamedTuple):
    """What is carried from step to step.

    Attributes:
      trained: The body, with the head of the task that is learned.
      heads: Those of all tasks, stacked; of that one as it was at its begin.
      held: What the method holds fixed of the tasks before.
      rest: The rest of the model's state.
      opt_state: Adam's.
      step: Steps done.  # shape=(), dtype=int32
      peak: Peak learning rate.  # shape=(), dtype=float32
    """

    trained: Any
    heads: Any
    held: Any
    rest: Any
    opt_state: Any
    step: jax.Array
    peak: jax.Array


def sets(config: SequenceConfig) -> list[data.Dataset]:
    """The tasks of a seed, in their order.

    Raises:
      ValueError: There are too few classes or alphabets.
    """
    rng = np.random.default_rng(config.seed)
    if config.data.name == OMNIGLOT:
        for name in ("label_noise", "labels"):
            if value := getattr(config.data, name):
                raise ValueError(
                    f"data.{name}={value}; accepted is the default: alphabets keep all "
                    "of their labels"
                )
        found = data.load_alphabets(
            data_dir=config.data.data_dir, download=config.data.download
        )
        large = [one[:CHARACTERS] for one in found if len(one) >= CHARACTERS]
        _enough(config, len(large), f"alphabets of {CHARACTERS} characters")
        learned = np.concatenate(large)[:, : -2 * _HELD]
        mean, std = channel_statistics(learned.reshape(-1, *learned.shape[2:]))
        chosen = rng.permutation(len(large))[: config.tasks]
        return [_alphabet(large[i], mean, std) for i in chosen]
    whole = load_data(config.data)
    each = whole.num_classes // config.tasks
    _enough(config, whole.num_classes // 2, "pairs of classes")
    parts = [
        data.with_classes(whole, at * each, (at + 1) * each)
        for at in range(config.tasks)
    ]
    return [
        dataclasses.replace(parts[i], mean=whole.mean, std=whole.std)
        for i in rng.permutation(config.tasks)
    ]


def _enough(config: SequenceConfig, there: int, what: str) -> None:
    if there < config.tasks:
        raise ValueError(
            f"tasks={config.tasks}; accepted are up to {there}, the {what} of "
            f"{config.data.name}"
        )


def _alphabet(drawings: np.ndarray, mean: Any, std: Any) -> data.Dataset:
    """Characters to tell apart, by uint8 drawings `(characters, drawings, …)`."""

    def split(part: np.ndarray) -> data.Split:
        labels = np.repeat(np.arange(len(part)), part.shape[1])
        return data.Split(part.reshape(-1, *part.shape[2:]), labels)

    train, validation, test = np.split(drawings, [-2 * _HELD, -_HELD], axis=1)
    parts = map(split, (train, validation, test))
    return data.Dataset("alphabet", *parts, len(drawings), mean, std)


class SequenceTask(tuned.Tuned):
    """The `Task` of a `SequenceConfig`.

    Args:
      config: The experiment.

    Raises:
      ValueError: If data or model do not fit.
    """

    def __init__(self, config: SequenceConfig):
        self.config = config
        self.sets = functools.cache(
            lambda seed: sets(dataclasses.replace(config, seed=seed))
        )
        first = self.sets(config.seed)[0]
        self.classifier = Classifier(first, config.model)
        _, rest = self.classifier.init(0)
        if jax.tree.leaves(rest):
            raise ValueError(
                f"model.name={config.model.name!r} keeps statistics of batches, which "
                "tasks would share; accepted are models without"
            )
        self.method = KINDS[config.method](config, self.apply, self.apply)
        self._steps: dict[tuple[int, bool], Callable[..., Any]] = {}
        self._sums = jax.jit(self._sums_of)
        share = functools.partial(
            Metric, "%", 1 / first.num_classes, scale=100.0, digits=2, higher=True
        )
        self.metrics = {
            "accuracy": share(examples=config.tasks * len(first.test)),
            "first": share(chooses=False, examples=len(first.test)),
            "last": share(chooses=False, examples=len(first.test)),
            "loss": Metric("nats", math.log(first.num_classes), digits=4),
        }

    def compile(self, config: SequenceConfig) -> None:
        """See `study.task.Task`: the steps of the first task, and of the others."""
        state, _ = self.step(self.init(config), config, 0)
        jax.block_until_ready(self.step(state, config, config.steps_each))

    def length(self, config: SequenceConfig) -> Length:
        """See `study.task.Task`."""
        steps = config.tasks * config.steps_each
        return Length(steps, steps)

    def apply(self, params: Any, rest: Any, x: jax.Array) -> jax.Array:
        """Logits of normalised images, by the head that the parameters have."""
        return self.classifier.logits(params, rest, x, mode="eval")[0]

    def init(self, config: SequenceConfig) -> SequenceState:
        """See `study.task.Task`."""
        params, rest = self.classifier.init(config.seed)
        heads = [self._head(config, task) for task in range(config.tasks)]
        params = {**params, HEAD: heads[0]}
        origin = lambda: self._origin(config, params, params, rest, 0)
        _, held = jax.eval_shape(lambda: self.method.begin(origin()))
        held = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), held)
        own = functools.partial(jax.tree.map, jnp.array)
        return SequenceState(
            own(params),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads),
            blank(held, config.tasks),
            own(rest),
            optax.scale_by_adam().init(params),
            jnp.int32(0),
            jnp.float32(config.tune_rate),
        )

    def _head(self, config: SequenceConfig, task: int) -> Any:
        """A fresh head."""
        return self.classifier.init(1000 * (task + 1) + config.seed)[0][HEAD]

    def _origin(
        self, config: SequenceConfig, params: Any, trained: Any, rest: Any, task: int
    ) -> Origin:
        """What the method looks at when a task is learned."""
        train = self.sets(config.seed)[task].train
        order = np.random.default_rng((config.seed, task)).permutation(len(train))
        seen = self._normalized(train.images[order[: config.images]])
        return Origin(params, trained, rest, seen, seen, jax.random.key(config.seed))

    def _normalized(self, images: Any) -> jax.Array:
        return data.normalize(images, self.classifier.dataset)

    def _next(
        self, state: SequenceState, config: SequenceConfig, task: int
    ) -> SequenceState:
        """The state at the begin of a task that is not the first."""
        body, done = state.trained, state.trained[HEAD]
        heads = jax.tree.map(
            lambda all, one: all.at[task - 1].set(one), state.heads, done
        )
        fresh = {**body, HEAD: jax.tree.map(lambda leaf: leaf[task], heads)}
        origin = self._origin(config, fresh, body, state.rest, task - 1)
        params, held = self.method.start(origin)
        own = functools.partial(jax.tree.map, jnp.array)
        return state._replace(
            trained=own(params),
            heads=heads,
            held=own(self.method.joined(state.held, held)),
            opt_state=optax.scale_by_adam().init(params),
        )

    def _stepper(self, steps: int, alone: bool) -> Callable[..., Any]:
        """The compiled step of tasks of a length, the first one alone or others."""
        if (steps, alone) in self._steps:
            return self._steps[steps, alone]
        schedule, method = tuned.schedule(steps), self.method

        def step(state: SequenceState, images: Any, labels: Any, at: Any) -> Any:
            def loss_fn(trained):
                logits = self.apply(trained, state.rest, self._normalized(images))
                value = tuned.entropies(logits, labels).mean()
                penalty = 0.0 if alone else method.penalty(trained, state.held)
                return value + penalty, value

            restrict = lambda updates: method.restrict(updates, state.held)
            return tuned.stepped(
                state,
                loss_fn,
                state.peak * schedule(at),
                *([] if alone else [restrict]),
            )

        self._steps[steps, alone] = jax.jit(step, donate_argnums=0)
        return self._steps[steps, alone]

    def step(
        self, state: SequenceState, config: SequenceConfig, number: int
    ) -> tuple[SequenceState, dict[str, jax.Array]]:
        """See `study.task.Task`."""
        task, at = divmod(number, config.steps_each)
        if at == 0 and task:
            state = self._next(state, config, task)
        train = self.sets(config.seed)[task].train
        batch = tuned.drawn(train, config.task_batch, config.seed, number)
        stepper = self._stepper(config.steps_each, task == 0)
        return stepper(state, *batch, jnp.int32(at))

    def _sums_of(self, params, rest, images, labels) -> jax.Array:
        logits = self.apply(params, rest, self._normalized(images))
        return tuned.sums(logits, labels)

    def evaluate(
        self, state: SequenceState, part: str, config: SequenceConfig
    ) -> dict[str, float]:
        """See `study.task.Task`: the mean over all tasks, the first and the last."""
        now = max(0, int(state.step) - 1) // config.steps_each
        found = []
        for task, dataset in enumerate(self.sets(config.seed)):
            head = jax.tree.map(lambda leaf, at=task: leaf[at], state.heads)
            head = state.trained[HEAD] if task == now else head
            params = {**state.trained, HEAD: head}
            sums = functools.partial(self._sums, params, state.rest)
            found.append(tuned.means(sums, getattr(dataset, part)))
        losses, right = zip(*found, strict=True)
        mean = lambda values: float(np.mean(values))
        return {
            "accuracy": mean(right),
            "first": right[0],
            "last": right[-1],
            "loss": mean(losses),
        }
