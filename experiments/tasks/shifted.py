"""A trained classifier on a stream of shifted images."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from experiments import data, shifted_rivals
from experiments.data.dataset import Dataset
from experiments.data.streams import arrange, batches
from experiments.shifted_config import ShiftedConfig
from experiments.shifted_rivals import Deployed, Method
from experiments.study.config import digest, what
from experiments.study.task import Length, Metric
from experiments.tasks.images import Classifier, ImageTask, load_data
from experiments.tasks.whole import train


def deployed(config: ShiftedConfig, dataset: Dataset | None = None) -> Deployed:
    """The trained model of a config, from its file where there is one.

    Args:
      config: Says how it is trained.
      dataset: The images; by default they are loaded.

    Returns:
      The model.
    """
    training = config.training()
    dataset = dataset or load_data(config.data)
    classifier = Classifier(dataset, config.model)
    file = config.models / f"{digest(what(training))}.msgpack"
    leaves, treedef = jax.tree.flatten(classifier.init(config.seed))
    if file.exists():
        leaves = serialization.from_bytes(leaves, file.read_bytes())
    else:
        leaves = jax.tree.leaves(train(ImageTask(training, dataset), training))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(serialization.to_bytes(leaves))
        partial.rename(file)
    params, rest = jax.tree.unflatten(treedef, map(jnp.asarray, leaves))

    def forward(mode: str) -> Callable[[Any, Any], Any]:
        return lambda arrays, x: classifier.logits(**arrays, x=x, mode=mode)[0]

    return Deployed(
        forward("eval"), forward("train"), {"params": params, "rest": rest}, dataset
    )


class Outcome(NamedTuple):
    """What a stream came to.

    Attributes:
      right: Whether each image was classified rightly, shape `(n,)`.
      losses: Cross entropies, shape `(n,)`.
      shift: As in the plan, shape `(n,)`.
      names: Of the shifts.
      seen: What the method says of itself after each batch.
    """

    right: np.ndarray
    losses: np.ndarray
    shift: np.ndarray
    names: tuple[str, ...]
    seen: list[dict[str, Any]]

    def by_shift(self) -> dict[str, float]:
        """Accuracy under each shift."""
        return {
            name: float(self.right[self.shift == at].mean())
            for at, name in enumerate(self.names)
            if np.any(self.shift == at)
        }


def follow(
    config: ShiftedConfig, model: Deployed, method: Method, part: str, images: int
) -> Outcome:
    """A method on a stream of a part of the data.

    Args:
      config: Which stream.
      model: Whose data.
      method: What answers.
      part: `"validation"` or `"test"`.
      images: Of each shift, at most.

    Returns:
      What it came to.
    """
    split = getattr(model.dataset, part)
    plan = arrange(
        split.labels,
        config.setting,
        count=min(images, len(split)),
        severity=config.severity,
        repeats=config.repeats,
        seed=config.seed,
    )
    state = method.init()
    right, losses, shifts, seen = [], [], [], []
    for batch in batches(split, plan, config.stream_batch, seed=config.seed):
        if batch.fresh:
            state = method.init()
        x = data.normalize(batch.images, model.dataset)
        logits, state = method.step(state, x)
        logs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
        right.append(logs.argmax(-1) == batch.labels)
        losses.append(-logs[np.arange(len(logs)), batch.labels])
        shifts.append(batch.shift)
        seen.append(method.says(state))
    joined = (np.concatenate(one) for one in (right, losses, shifts))
    return Outcome(*joined, plan.names, seen)


class Model(NamedTuple):
    """The state of a run: a trained model is all of it.

    Attributes:
      arrays: Of the model.
      step: Steps done.  # shape=(), dtype=int32
    """

    arrays: Any
    step: jax.Array


class ShiftedTask:
    """The `Task` of a `ShiftedConfig`: a run is one step, and then the stream.

    Args:
      config: The experiment.
    """

    digest = ""

    def __init__(self, config: ShiftedConfig):
        self.dataset = load_data(config.data)
        shifted_rivals.check(config.method, config.model.name)
        classes, examples = self.dataset.num_classes, len(self.dataset.test)
        self.metrics = {
            "accuracy": Metric("%", 1 / classes, 100.0, True, 2, True, examples),
            "loss": Metric("nats", math.log(classes), digits=4),
        }
        self._methods: dict[int, tuple[Deployed, Method]] = {}

    def _made(self, config: ShiftedConfig) -> tuple[Deployed, Method]:
        if config.seed not in self._methods:
            model = deployed(config, self.dataset)
            method = shifted_rivals.build(config.method, model)
            self._methods = {config.seed: (model, method)}
        return self._methods[config.seed]

    def length(self, config: ShiftedConfig) -> Length:
        """See `study.task.Task`."""
        return Length(1, 1)

    def compile(self, config: ShiftedConfig) -> None:
        """See `study.task.Task`."""

    def init(self, config: ShiftedConfig) -> Model:
        """See `study.task.Task`."""
        return Model(self._made(config)[0].arrays, jnp.int32(0))

    def step(
        self, state: Model, config: ShiftedConfig, number: int
    ) -> tuple[Model, dict[str, Any]]:
        """The model was trained before."""
        return state._replace(step=state.step + 1), {"loss": jnp.float32(0)}

    def evaluate(
        self, state: Model, part: str, config: ShiftedConfig
    ) -> dict[str, Any]:
        """Means over the stream; on validation data of a batch of each shift."""
        model, method = self._made(config)
        images = config.images if part == "test" else config.stream_batch
        once = config if part == "test" else dataclasses.replace(config, repeats=1)
        found = follow(once, model, method, part, images)
        loss = float(np.mean(np.minimum(found.losses, 100.0)))
        return {"accuracy": float(np.mean(found.right)), "loss": loss}

    def observe(self, state: Model) -> tuple[dict[str, Any], Model]:
        """See `study.task.Task`."""
        return {"bases": None, "probe": None}, state

    def advice(self, config: ShiftedConfig) -> str:
        """See `study.task.Task`."""
        return "try method none"
