"""Classification of images by a Flax model."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dsbp_jax
from experiments import checks, data, models
from experiments.config import DataConfig, ImageConfig, ModelConfig
from experiments.optimizers import Uses
from experiments.probes import Probe
from experiments.study.task import Length, Metric
from experiments.tasks.optimized import Optimized, TrainState

# What is measured of the Hessian, by metric: methods of the probe.
CURVATURES = {"hessian": "top_hessian_eigenvalue", "trace": "hessian_trace"}


def load_data(config: DataConfig, number: int = 0) -> data.Dataset:
    """Loads the data set that a config names, and of its folds the one asked for."""
    seed = config.split_seed
    dataset = data.load(
        config.name, data_dir=config.data_dir, download=config.download, seed=seed
    )
    if config.folds is not None:
        dataset = data.fold(dataset, config.folds, number, seed=seed)
    if config.labels is not None:
        train = data.few(dataset.train, config.labels, seed=seed)
        dataset = dataclasses.replace(dataset, train=train)
    return data.with_label_noise(dataset, config.label_noise, seed=seed)


class Classifier:
    """A model as pure functions of its parameters.

    Args:
      dataset: The images that it classifies.
      config: Which model.

    Raises:
      ValueError: If the model does not fit the images, or the memory.
    """

    def __init__(self, dataset: data.Dataset, config: ModelConfig):
        self.dataset = dataset
        self.config = config
        model = self._build(0)
        model.train()
        train, _, _ = nnx.split(model, nnx.Param, ...)
        model.eval()
        evaluation, _, _ = nnx.split(model, nnx.Param, ...)
        self._graphs = {"train": train, "eval": evaluation}

    def _build(self, seed: int) -> nnx.Module:
        return models.build(
            self.config.name,
            image_shape=self.dataset.image_shape,
            num_classes=self.dataset.num_classes,
            rngs=nnx.Rngs(seed),
            **self.config.options,
        )

    def init(self, seed: int) -> tuple[Any, Any]:
        """Fresh parameters, and the rest of the model's state."""
        _, params, rest = nnx.split(self._build(seed), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(
        self, params: Any, rest: Any, images: jax.Array, *, mode: str
    ) -> tuple[jax.Array, Any]:
        """Logits of uint8 images, and the rest after them.

        Args:
          params: The parameters.
          rest: The rest of the model's state.
          images: uint8 images `(n, height, width, channels)`.
          mode: `"train"` or `"eval"`.

        Returns:
          Logits `(n, num_classes)` and the new rest.
        """
        return self.logits(
            params, rest, data.normalize(images, self.dataset), mode=mode
        )

    def logits(
        self, params: Any, rest: Any, x: jax.Array, *, mode: str
    ) -> tuple[jax.Array, Any]:
        """The same of images that are normalised already."""
        model = nnx.merge(self._graphs[mode], params, rest, copy=True)
        logits = model(x)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    def loss(
        self, params: Any, rest: Any, images: jax.Array, labels: jax.Array, mode: str
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        """Mean cross entropy; beside it the logits and the rest."""
        logits, rest = self.apply(params, rest, images, mode=mode)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, rest)

    def uses(self) -> Uses:
        """How the model uses its parameters."""
        params, rest = jax.eval_shape(lambda: self.init(0))
        images = self.dataset.train.images[:1]
        forward = lambda *args: self.apply(*args, images, mode="eval")[0]
        return Uses.of(dsbp_jax.roles(forward, params, rest))


class ImageTask(Optimized):
    """The `Task` of an `ImageConfig`.

    Args:
      config: The experiment.
      dataset: Its images; by default they are loaded, of folds that of its seed.

    Raises:
      ValueError: If the model, the optimizer or the batch size does not fit.
    """

    def __init__(self, config: ImageConfig, dataset: data.Dataset | None = None):
        self.dataset = dataset or load_data(config.data, config.seed)
        size, name = config.batch_size, self.dataset.name
        self.per_epoch = len(self.dataset.train) // size
        if not self.per_epoch:
            raise ValueError(
                f"batch_size={size}; accepted are 1 to {len(self.dataset.train)}, the "
                f"training images of {name}"
            )
        self.classifier = Classifier(self.dataset, config.model)
        self.evaluation_step = jax.jit(self._evaluation_step)
        super().__init__(config)
        self.probe = None
        if config.probe.batch_size:
            self.probe = Probe(self.classifier, config.probe, self.dataset.train)
        classes = self.dataset.num_classes
        # With folds, intervals have the choice of test examples in them.
        examples = None if config.data.folds else len(self.dataset.test)
        self.metrics = {
            "accuracy": Metric("%", 1 / classes, 100.0, True, 2, True, examples),
            "loss": Metric("nats", math.log(classes), digits=4),
        }
        if config.sharpness:
            for name in CURVATURES:
                self.metrics[name] = Metric("", math.inf, chooses=False, digits=2)
        self._upcoming: tuple[Any, ...] = ()

    def length(self, config: ImageConfig) -> Length:
        """See `study.task.Task`."""
        steps = config.steps or self.per_epoch * config.epochs
        if steps > checks.MOST:
            raise ValueError(
                f"epochs={config.epochs}; accepted are up to "
                f"{checks.MOST // self.per_epoch}, of {self.per_epoch} steps each"
            )
        return Length(steps, self.per_epoch * config.eval_every)

    def fresh(self, seed: int) -> tuple[Any, Any]:
        """See `Optimized`."""
        return self.classifier.init(seed)

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Optimized`."""
        first = self.dataset.train.take(np.arange(self.config.batch_size))
        return first.images, first.labels

    def batch(self, config: ImageConfig, number: int) -> tuple[Any, ...]:
        """Images `(n, height, width, channels)`, uint8, and their labels."""
        epoch, index = divmod(number, self.per_epoch)
        if self._upcoming[:3] != (config.seed, epoch, index):
            batches = data.epoch_batches(
                self.dataset.train, config.batch_size, seed=config.seed, epoch=epoch
            )
            later = itertools.islice(batches, index, None)
        else:
            later = self._upcoming[3]
        self._upcoming = config.seed, epoch, index + 1, later
        return next(later)

    def prepared(self, batch: tuple[Any, ...], key: jax.Array) -> tuple[Any, ...]:
        """Shifts and flips, where they are asked for."""
        images, labels = batch
        if self.config.data.augment:
            images = data.augment(images, key)
        return images, labels

    def loss(
        self, params: Any, rest: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """See `Optimized`."""
        value, (logits, rest) = self.classifier.loss(
            params, rest, images, labels, mode="train"
        )
        return value, ({"accuracy": jnp.mean(logits.argmax(-1) == labels)}, rest)

    def uses(self) -> Uses:
        """See `Optimized`."""
        return self.classifier.uses()

    def init(self, config: ImageConfig) -> TrainState:
        """See `study.task.Task`."""
        if config.data.folds and config.seed != self.config.seed:
            raise ValueError(
                f"seed={config.seed}; accepted is {self.config.seed}, of whose fold "
                "this task is"
            )
        state = super().init(config)
        if self.probe is None:
            return state
        return state._replace(seen=self.probe.init(self.params(state), state.rest))

    def _evaluation_step(self, params, rest, images, labels, weights):
        """Sums of loss and of right answers over the examples of weight one."""
        logits, _ = self.classifier.apply(params, rest, images, mode="eval")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (logits.argmax(-1) == labels).astype(jnp.float32)
        # A weight of zero must hide even a loss that is not finite.
        return jnp.where(weights, jnp.stack([losses, hits]), 0).sum(axis=1)

    def evaluate(
        self, state: TrainState, part: str, config: ImageConfig, batch_size: int = 500
    ) -> dict[str, float]:
        """Means over a whole split, the model in evaluation mode.

        Args:
          state: The state.
          part: `"validation"` or `"test"`.
          config: Whether curvature is measured with the test.
          batch_size: Images at a time; the last batch is padded.

        Returns:
          The metrics.
        """
        split = getattr(self.dataset, part)
        batch_size = min(batch_size, len(split))
        params = self.params(state)
        pending = []
        for start in range(0, len(split), batch_size):
            index = np.arange(start, start + batch_size)
            real = index < len(split)
            some = split.take(np.where(real, index, 0))
            pending.append(
                self.evaluation_step(params, state.rest, some.images, some.labels, real)
            )
        sums = np.sum(jax.device_get(pending), axis=0, dtype=np.float64)
        loss, accuracy = map(float, sums / len(split))
        found = {"accuracy": accuracy, "loss": loss}
        for name, method in CURVATURES.items() if config.sharpness else ():
            value = None
            if part == "test":
                value = getattr(self.probe, method)(params, state.rest)
            found[name] = math.inf if value is None else value
        return found

    def observe(self, state: TrainState) -> tuple[dict[str, Any], TrainState]:
        """See `study.task.Task`."""
        found, state = super().observe(state)
        if self.probe is None:
            return found | {"probe": None}, state
        measured, seen = self.probe(self.params(state), state.rest, state.seen)
        return found | {"probe": measured}, state._replace(seen=seen)
