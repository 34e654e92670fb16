"""Steps of any contender on any loss: what image and text tasks have in common.

Everything that changes during training is in `TrainState`; everything random in a step
follows from a key and the number of the step. So a state that was saved and read back
goes on exactly as the one in memory would have.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dsbp_jax
from experiments import optimizers
from experiments.config import OptimizedConfig
from experiments.optimizers.gradients import GradientSource

MAX_ROWS = 4096  # of a layer's activations, for the bases that follow them


class TrainState(NamedTuple):
    """All that training carries from one step to the next.

    Attributes:
      params: What the optimizer moves, nested dicts of arrays: the trainable
        parameters, or what stands for them (`Optimized.params` has the former).
      carried: What the source of gradients keeps beside them.
      rest: Whatever else the model keeps: batch statistics, random counts.
      opt_state: The state of the optimizer.
      seen: What the last probe left for the next one.
      step: Steps done.  # shape=(), dtype=int32
      key: Of what is random in a step.
      peak: Peak learning rate.  # shape=(), dtype=float32
      length: Steps of the whole run.  # shape=(), dtype=int32
    """

    params: Any
    carried: Any
    rest: Any
    opt_state: Any
    seen: Any
    step: jax.Array
    key: jax.Array
    peak: jax.Array
    length: jax.Array


class Optimized:
    """The compiled steps of an experiment, for all seeds, rates and lengths.

    A subclass has `fresh(seed)`, parameters and rest of the model; `sample()`, a batch
    of the shapes of all; `batch(config, number)`; `loss(params, rest, *batch)`, the
    value and `(report, rest)`; `uses()`; and `length(config)` of the protocol.

    Args:
      config: The experiment.
    """

    digest = ""

    def __init__(self, config: OptimizedConfig):
        self.config = config
        self._uses = self.uses()
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._catch_up, self._fold = (
            jax.jit(partial(self._train_step, kind=kind), donate_argnums=0)
            for kind in ("catch_up", "observe")
        )
        self._refresh = jax.jit(self._refresh_step, donate_argnums=0)
        self._init = jax.jit(self._start)
        self._params = jax.jit(self._settled)
        source, given = self._source(), config.optimizer.gradients
        self.every = (source.refresh or source.fold) and given.refresh_every
        self.folds = bool(source.fold)
        self.catch_up_every = source.catch_up and given.catch_up_every

    def init(self, config: OptimizedConfig) -> TrainState:
        """See `study.task.Task`."""
        params, rest = self.fresh(config.seed)
        key = jax.random.key(config.seed)
        moved, carried = self._init(params, rest, *self.sample(), key)
        peak = jnp.float32(config.optimizer.optimizer.learning_rate)
        length = jnp.int32(self.length(config).steps)
        opt_state = self._optimizer(peak, length, carried).init(moved)
        step = jnp.int32(0)
        return TrainState(moved, carried, rest, opt_state, (), step, key, peak, length)

    def params(self, state: TrainState) -> Any:
        """The parameters of a state, as they are evaluated."""
        return self._params(state.params, state.carried, state.opt_state)

    def _settled(self, moved: Any, carried: Any, opt_state: Any) -> Any:
        moved = self.config.optimizer.optimizer.settled(opt_state, moved)
        return self._source().params(moved, carried)

    def _source(self) -> GradientSource:
        return self.config.optimizer.gradients.build(self._loss)

    def _start(self, params: Any, *args: Any) -> tuple[Any, Any]:
        *args, key = args
        return self._source().init(params, *args, key=key)

    def _optimizer(
        self, peak: jax.Array, length: jax.Array, carried: Any
    ) -> optax.GradientTransformationExtraArgs:
        in_columns = isinstance(carried, dsbp_jax.Frame)
        return optimizers.build(
            self.config.optimizer,
            length,
            peak=peak,
            uses=self._uses.in_coordinates(carried) if in_columns else self._uses,
        )

    def _loss(self, *args: Any) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        """The loss; beside it report, rest, and the activations asked for."""
        loss, activations = self.loss, None
        if sides := self.config.optimizer.optimizer.activations:
            loss = dsbp_jax.capture_activations(loss, max_rows=MAX_ROWS, which=sides)
            (value, (report, rest)), activations = loss(*args)
        else:
            value, (report, rest) = loss(*args)
        return value, (report, rest, activations)

    def compile(self, config: OptimizedConfig) -> None:
        """See `study.task.Task`."""
        state = self.init(config)
        last = self.every - 1 if self.folds else self.every
        for number in (1, last or 1, self.catch_up_every or 1):
            state, _ = self._advance(state, self.sample(), number)
        jax.block_until_ready(state)

    def step(
        self, state: TrainState, config: OptimizedConfig, number: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """See `study.task.Task`."""
        return self._advance(state, self.batch(config, number), number)

    def _advance(
        self, state: TrainState, batch: Any, number: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """A step, after a refresh where one is due, or with a fold at its end."""
        if self.folds and (number + 1) % self.every == 0:
            return self._fold(state, *batch)
        if self.every and not self.folds and number and number % self.every == 0:
            rows = self.config.optimizer.gradients.rows(len(batch[0]))
            state = self._refresh(state, *(part[:rows] for part in batch))
        late = self.catch_up_every and number % self.catch_up_every == 0
        return (self._catch_up if late else self._step)(state, *batch)

    def _refresh_step(self, state: TrainState, *batch: jax.Array) -> TrainState:
        """Refreshes what the gradients' source carries, on a part of a batch."""
        carried = self._source().refresh(
            state.params, state.carried, state.rest, *batch
        )
        return state._replace(carried=carried)

    def _train_step(
        self,
        state: TrainState,
        *batch: jax.Array,
        kind: Literal["value_and_grad", "catch_up", "observe"] = "value_and_grad",
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The compiled part of a step; one that observes ends with a fold."""
        key = jax.random.fold_in(state.key, state.step)
        batch = self.prepared(batch, key)
        source = self._source()
        gradient = getattr(source, kind)
        batch = state.rest, *batch
        (value, (report, rest, activations)), grads, carried, *seen = gradient(
            state.params, state.carried, *batch
        )
        optimizer = self._optimizer(state.peak, state.length, state.carried)
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            activations=activations,
            grad_fn=lambda params, _: gradient(params, state.carried, *batch)[1],
        )
        params = optax.apply_updates(state.params, updates)
        if seen:
            shrink = self._shrink(state)
            params, carried, opt_state = source.fold(
                params, carried, opt_state, *seen, shrink, key
            )
        new = state._replace(
            params=params,
            carried=carried,
            rest=rest,
            opt_state=opt_state,
            step=state.step + 1,
        )
        return new, {"loss": value, **report}

    def _shrink(self, state: TrainState) -> jax.Array | None:
        """What the decay of a period leaves of kernels that are folded at its end."""
        optimizer = self.config.optimizer.optimizer
        if not optimizer.weight_decay:
            return None
        schedule = optimizers.learning_rate_schedule(
            optimizer, state.length, state.peak
        )
        end = state.step + 1
        return dsbp_jax.decay_since(
            schedule, optimizer.weight_decay, end - self.every, end
        )

    def prepared(self, batch: tuple[Any, ...], key: jax.Array) -> tuple[Any, ...]:
        """What is random in a batch."""
        del key
        return batch

    def observe(self, state: TrainState) -> tuple[dict[str, Any], TrainState]:
        """See `study.task.Task`."""
        bases = optimizers.diagnostics(self.config.optimizer, state.opt_state)
        return {"bases": bases}, state

    def advice(self, config: OptimizedConfig) -> str:
        """See `study.task.Task`."""
        rate = config.optimizer.optimizer.learning_rate
        return f"try a lower learning_rate than {rate:g}"
