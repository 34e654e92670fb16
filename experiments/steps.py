"""A Flax model as pure functions, and the compiled steps of training and evaluation.

Everything that changes during training is in `TrainState`; everything random in a
step follows from a key and the number of the step. So a state that was saved and
read back goes on exactly as the one in memory would have.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dsbp_jax
from experiments import data, gradients, models, optimizers
from experiments.config import Config, ModelConfig

MAX_ROWS = 4096  # of a layer's activations, for the bases that follow them


class TrainState(NamedTuple):
    """All that training carries from one step to the next.

    Attributes:
      params: What the optimizer moves, nested dicts of arrays: the trainable
        parameters, or their coordinates (`Trainer.params` has the former always).
      carried: What the source of gradients keeps beside them.
      rest: Whatever else the model keeps: batch statistics, random counts.
      opt_state: The state of the optimizer.
      step: Steps done.  # shape=(), dtype=int32
    """

    params: Any
    carried: Any
    rest: Any
    opt_state: Any
    step: jax.Array


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
        model = nnx.merge(self._graphs[mode], params, rest, copy=True)
        logits = model(data.normalize(images, self.dataset))
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    def loss(
        self, params: Any, rest: Any, images: jax.Array, labels: jax.Array, mode: str
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        """Mean cross entropy; beside it the logits and the rest."""
        logits, rest = self.apply(params, rest, images, mode=mode)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, rest)

    def uses(self) -> optimizers.Uses:
        """How the model uses its parameters."""
        params, rest = jax.eval_shape(lambda: self.init(0))
        images = self.dataset.train.images[:1]
        forward = lambda *args: self.apply(*args, images, mode="eval")[0]
        layout = dsbp_jax.layout(forward, params, rest)
        return optimizers.Uses(layout, dsbp_jax.roles(forward, params, rest))


class Trainer:
    """The compiled steps of one experiment, shared by its seeds and learning rates.

    Args:
      classifier: The model.
      config: The experiment.
      num_steps: Steps of the whole run, for the schedule.
    """

    def __init__(self, classifier: Classifier, config: Config, num_steps: int):
        self.classifier = classifier
        self.config = config
        self.num_steps = num_steps
        self._uses = classifier.uses()
        self.evaluation_step = jax.jit(self._evaluation_step)
        self._held: frozenset[str] = frozenset()
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._catch_up = jax.jit(
            partial(self._train_step, catch_up=True), donate_argnums=0
        )
        self._refresh = jax.jit(self._refresh_step, donate_argnums=0)
        self._init = jax.jit(self._start)
        source = self._source()
        self._params = jax.jit(source.params)
        self.every = source.refresh and config.optimizer.refresh_every
        self.catch_up_every = source.catch_up and config.optimizer.catch_up_every

    def init(self, seed: int) -> TrainState:
        """The state before the first step."""
        params, rest = self.classifier.init(seed)
        first = self.classifier.dataset.train.take(np.arange(self.config.batch_size))
        args = rest, first.images, first.labels
        moved, carried = self._init(params, *args, jax.random.key(seed))
        if isinstance(carried, dsbp_jax.Frame):
            self._held = frozenset(carried.kernels)
        opt_state = self._optimizer().init(moved)
        return TrainState(moved, carried, rest, opt_state, jnp.int32(0))

    def params(self, state: TrainState) -> Any:
        """The parameters of a state."""
        return self._params(state.params, state.carried)

    def _source(self, peak: float | jax.Array = 0.0) -> gradients.Source:
        return gradients.build(self.config.optimizer, self._loss, peak)

    def _start(self, params: Any, *args: Any) -> tuple[Any, Any]:
        *args, key = args
        return self._source().init(params, *args, key=key)

    def _optimizer(
        self, peak: jax.Array | None = None
    ) -> optax.GradientTransformationExtraArgs:
        return optimizers.build(
            self.config.optimizer,
            self.num_steps,
            peak=peak,
            uses=self._uses,
            held=self._held,
        )

    def _loss(self, *args: Any) -> tuple[jax.Array, tuple[jax.Array, Any, Any]]:
        """The loss; beside it logits, rest, and the activations asked for."""
        loss = partial(self.classifier.loss, mode="train")
        activations = None
        if sides := self.config.optimizer.sides:
            loss = dsbp_jax.capture_activations(loss, max_rows=MAX_ROWS, which=sides)
            (value, (logits, rest)), activations = loss(*args)
        else:
            value, (logits, rest) = loss(*args)
        return value, (logits, rest, activations)

    def compile(self) -> None:
        """Compiles the training step, by one of a state that is thrown away."""
        first = self.classifier.dataset.train.take(np.arange(self.config.batch_size))
        args = first.images, first.labels, jax.random.key(0), jnp.float32(0)
        state = self.init(0)
        for step in (1, self.every or 1, self.catch_up_every or 1):
            state, _ = self.train_step(state, *args, step=step)
        jax.block_until_ready(state)

    def train_step(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        peak: jax.Array,
        *,
        step: int,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on a batch, after a refresh where one is due.

        Args:
          state: The state; its buffers are reused.
          images: uint8 images `(n, height, width, channels)`.
          labels: int32 labels `(n,)`.
          key: The key of the run.
          peak: The peak learning rate.
          step: The number of the step, known without asking the device.

        Returns:
          The new state, and loss and accuracy before the step.
        """
        if self.every and step and step % self.every == 0:
            rows = gradients.rows_of_refresh(self.config.optimizer, len(images))
            state = self._refresh(state, images[:rows], labels[:rows], peak)
        late = self.catch_up_every and step % self.catch_up_every == 0
        compiled = self._catch_up if late else self._step
        return compiled(state, images, labels, key, peak)

    def _refresh_step(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        peak: jax.Array,
    ) -> TrainState:
        """Refreshes what the gradients' source carries, on a part of a batch."""
        schedule = optimizers.learning_rate_schedule(
            self.config.optimizer, self.num_steps, 1.0
        )
        # The decay of kernels goes with the rates of the steps since the last one.
        steps = sum(schedule(state.step - back) for back in range(1, self.every + 1))
        refresh = self._source(peak).refresh
        moved, carried, opt_state = refresh(
            state.params,
            state.carried,
            state.opt_state,
            steps,
            state.rest,
            images,
            labels,
        )
        return state._replace(params=moved, carried=carried, opt_state=opt_state)

    def _train_step(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        peak: jax.Array,
        catch_up: bool = False,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The compiled part of `train_step`."""
        if self.config.data.augment:
            images = data.augment(images, jax.random.fold_in(key, state.step))
        source = self._source(peak)
        gradient = source.catch_up if catch_up else source.value_and_grad
        batch = state.rest, images, labels
        (value, (logits, rest, activations)), grads, carried = gradient(
            state.params, state.carried, *batch
        )
        updates, opt_state = self._optimizer(peak).update(
            grads,
            state.opt_state,
            state.params,
            activations=activations,
            grad_fn=lambda params, _: gradient(params, state.carried, *batch)[1],
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "accuracy": jnp.mean(logits.argmax(-1) == labels)}
        return TrainState(params, carried, rest, opt_state, state.step + 1), metrics

    def _evaluation_step(self, params, rest, images, labels, weights):
        """Sums of loss and of right answers over the examples of weight one."""
        logits, _ = self.classifier.apply(params, rest, images, mode="eval")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (logits.argmax(-1) == labels).astype(jnp.float32)
        # A weight of zero must hide even a loss that is not finite.
        return jnp.where(weights, jnp.stack([losses, hits]), 0).sum(axis=1)

    def evaluate(
        self, state: TrainState, split: data.Split, batch_size: int = 500
    ) -> dict[str, float]:
        """Mean loss and accuracy on a whole split, the model in evaluation mode.

        Args:
          state: The state.
          split: The examples.
          batch_size: Images at a time; the last batch is padded.

        Returns:
          A dict with `loss` and `accuracy`.
        """
        batch_size = min(batch_size, len(split))
        params = self.params(state)
        pending = []
        for start in range(0, len(split), batch_size):
            index = np.arange(start, start + batch_size)
            real = index < len(split)
            part = split.take(np.where(real, index, 0))
            pending.append(
                self.evaluation_step(params, state.rest, part.images, part.labels, real)
            )
        sums = np.sum(jax.device_get(pending), axis=0, dtype=np.float64)
        loss, accuracy = sums / len(split)
        return {"loss": float(loss), "accuracy": float(accuracy)}
