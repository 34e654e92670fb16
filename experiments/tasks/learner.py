"""A meta-learner by its config: compiled outer steps and evaluations."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

import dsbp_jax
from dsbp_jax import meta
from dsbp_jax.transforms import WHITENED
from experiments import models
from experiments.fewshot_config import SINE, FewshotConfig
from experiments.tasks.episodes import make_episodes

EVAL_SEED = 0  # of the tasks of validation and test


class MetaState(NamedTuple):
    """What an outer step changes, and its rates.

    Attributes:
      params: The start, with its rates where they are learned.
      opt_state: Of the outer optimizer.
      tracked: The bases carried over tasks, else None.
      step: Outer steps so far.
      inner: Learning rate of the inner steps.  # shape=(), dtype=float32
      outer: Of the outer steps.  # shape=(), dtype=float32
    """

    params: Any
    opt_state: Any
    tracked: Any
    step: jax.Array
    inner: jax.Array
    outer: jax.Array


class Learner:
    """The compiled functions of a few-shot experiment.

    Under `vmap` the tasks of a step are split over as many of the process's devices as
    divide their number; the state is on each of these.

    Args:
      config: The experiment.
      dataset: Its images; None for sine.

    Raises:
      ValueError: The model, the tasks or the method do not fit.
    """

    def __init__(self, config: FewshotConfig, dataset: Any):
        self.config = config
        self.episodes = make_episodes(config, dataset)
        self.training_episodes = make_episodes(config, dataset, training=True)
        self.regression = config.data.name == SINE
        self.is_spectral = config.method.startswith("spectral_")
        self.carried = self.is_spectral and config.spectral.basis == "carried"
        self.is_whitened = config.method.startswith("whitened_")
        self._graph, params, self._rest = nnx.split(self._build(0), nnx.Param, ...)
        self._shapes = jax.eval_shape(lambda: params)
        self._own = config.reptile if config.method == "reptile" else config.inner
        if self.carried:
            self.tracker = dsbp_jax.track_bases(
                config.spectral.rank,
                source=config.spectral.source,
                side=config.spectral.side,
                layout=self._roles.layout,
            )
        self._by_task, self._on_each = shardings(config)
        self.arrays = self._to_each("train")
        self._step = jax.jit(self._outer_step, static_argnums=3, donate_argnums=0)
        self._curves = jax.jit(self._adaptation_curves)

    def _build(self, seed: int) -> nnx.Module:
        shape = self.episodes.shape
        return models.build(
            self.config.model.name,
            image_shape=shape if len(shape) == 3 else (1, 1, *shape),
            num_classes=self.episodes.outputs,
            rngs=nnx.Rngs(seed),
            **self.config.model.options,
        )

    @functools.cached_property
    def _roles(self) -> dsbp_jax.Roles:
        x = jax.ShapeDtypeStruct((2, *self.episodes.shape), jnp.float32)
        return dsbp_jax.roles(self.forward, self._shapes, x)

    def forward(self, params: Any, x: jax.Array) -> jax.Array:
        """The network; batch statistics are those of the batch, in every phase."""
        return nnx.merge(self._graph, params, self._rest, copy=True)(x)

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Squared error, or cross-entropy."""
        x, y = batch
        out = self.forward(params, x)
        if self.regression:
            return jnp.mean((out - y) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    def metrics(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        """The loss, and the accuracy of a classifier."""
        found = {"loss": self.loss(params, batch)}
        if not self.regression:
            right = jnp.argmax(self.forward(params, batch[0]), -1) == batch[1]
            found["accuracy"] = jnp.mean(right.astype(jnp.float32))
        return found

    def _inner(self, rate: Any) -> optax.GradientTransformation:
        descent = optax.sgd(rate)
        options = self.config.spectral
        if self.is_whitened:
            hidden = {
                path: view
                for path, view in self._roles.layout.items()
                if self._roles.get(path) in WHITENED
            }
            layout = dsbp_jax.Layout(hidden)
            whitening = dsbp_jax.spectral_whitening(
                options.rank, scale="update", layout=layout
            )
            return optax.chain(whitening, descent)
        if not self.is_spectral:
            return descent
        projection = dsbp_jax.spectral_projection(
            options.rank,
            source=options.source,
            side=options.side,
            residual=options.residual,
            refresh_every=options.refresh_every,
            layout=self._roles.layout,
        )
        return optax.chain(projection, descent)

    def method(self, num_steps: int, rate: Any) -> meta.Maml:
        """The method, with so many inner steps of a rate, which may be traced."""
        config, inner = self.config, self._inner(rate)
        method = config.method.removeprefix("spectral_").removeprefix("whitened_")
        axis = config.outer.task_axis
        shared: dict[str, Any] = {"task_axis": int(axis) if axis.isdecimal() else axis}
        if method == "reptile":
            return meta.reptile(
                self.loss,
                inner,
                num_steps,
                batch_size=config.reptile.batch_size,
                **shared,
            )
        shared["checkpoint"] = config.inner.checkpoint
        if method == "anil":
            return meta.anil(self.loss, inner, num_steps, head="head", **shared)
        first_order = method == "fomaml"
        return meta.maml(self.loss, inner, num_steps, first_order=first_order, **shared)

    def _outer(self, rate: Any) -> optax.GradientTransformation:
        clip = optax.clip_by_global_norm(self.config.outer.clip)
        if self.config.outer.optimizer == "adam":
            return optax.chain(clip, optax.adam(rate))
        return optax.chain(clip, dsbp_jax.spectral_muon(rate, hidden=self._roles))

    def init(self, seed: int, config: FewshotConfig | None = None) -> MetaState:
        """The state before the first step, with the rates of a config."""
        config = config or self.config
        rates = config.inner.learning_rate, config.outer.learning_rate
        params = start = nnx.split(self._build(seed), nnx.Param, ...)[1]
        if self.config.inner.learned_rates and self.config.method != "reptile":
            start = meta.with_rates(params)
        tracked = self.tracker.init(params) if self.carried else None
        step = jnp.zeros((), jnp.int32)
        inner, outer = map(jnp.float32, rates)
        opt_state = self._outer(outer).init(start)
        state = MetaState(start, opt_state, tracked, step, inner, outer)
        return jax.device_put(state, self._on_each)

    def draw(self, seed: int, step: int) -> dict:
        """The tasks of an outer step."""
        tasks = self.config.tasks
        drawn = self.training_episodes.draw("train", tasks, seed=seed, step=step)
        return jax.device_put(drawn, self._by_task)

    def _to_each(self, part: str) -> Any:
        return jax.device_put(self.episodes.arrays(part), self._on_each)

    def step(self, state: MetaState, drawn: dict, step: int) -> tuple:
        """One outer step, whose buffers are reused: the new state and the loss."""
        due = self.carried and step % self.config.spectral.refresh_every == 0
        return self._step(state, self.arrays, drawn, due)

    def _outer_step(
        self, state: MetaState, arrays: Any, drawn: dict, refresh: bool
    ) -> tuple:
        tasks = self.training_episodes.build(arrays, drawn)
        given = {"bases": dsbp_jax.eigenspaces(state.tracked)} if self.carried else {}
        training = self.method(self._own.steps, state.inner)
        loss, grads = jax.value_and_grad(training.meta_loss)(
            state.params, tasks, **given
        )
        outer = self._outer(state.outer)
        updates, opt_state = outer.update(grads, state.opt_state, state.params)
        tracked = state.tracked
        if refresh:
            params, gradient = map(meta.plain_params, (state.params, grads))
            activations = None
            if self.config.spectral.source == "activation":
                activations = training.activations(params, tasks)
            _, tracked = self.tracker.update(
                gradient, tracked, params, activations=activations, refresh=True
            )
        params = optax.apply_updates(state.params, updates)
        state = state._replace(
            params=params, opt_state=opt_state, tracked=tracked, step=state.step + 1
        )
        return jax.lax.with_sharding_constraint(state, self._on_each), loss

    def compile(self, state: MetaState) -> None:
        """Compiles the outer steps, so that no later step waits for it."""
        drawn = self.draw(0, 0)
        for due in {False, self.carried}:
            copy = jax.tree.map(jnp.copy, state)  # its buffers are reused
            jax.block_until_ready(self._step(copy, self.arrays, drawn, due))

    def evaluate(
        self, state: MetaState, part: str, episodes: int, seed: int = EVAL_SEED
    ) -> dict[str, Any]:
        """Adapts to tasks of `"validation"` or `"test"`.

        Args:
          state: The state.
          part: Which.
          episodes: How many tasks.
          seed: Seed of the tasks; by default they are the same for every run.

        Returns:
          By metric `mean` and `ci95`, half the width of a 95 % confidence interval,
          after the last inner step; and `curve`, the means after each, the start first.
        """
        arrays, devices = self._to_each(part), self._by_task.num_devices
        chunk = math.ceil(self.config.outer.tasks / devices) * devices
        drawn = self.episodes.draw(part, episodes, seed=seed, step=0)
        found = []
        for first in range(0, episodes, chunk):
            # The last chunk is filled up, so that all have one shape.
            chosen = np.arange(first, first + chunk) % episodes
            some = jax.tree.map(lambda values, chosen=chosen: values[chosen], drawn)
            some = jax.device_put(some, self._by_task)
            found.append(
                self._curves(state.params, state.tracked, state.inner, arrays, some)
            )
        curves = jax.tree.map(lambda *x: np.concatenate(x)[:episodes], *found)
        return {name: summary(curve) for name, curve in curves.items()}

    def _adaptation_curves(
        self, params: Any, tracked: Any, rate: Any, arrays: Any, drawn: dict
    ) -> dict[str, jax.Array]:
        tasks = self.episodes.build(arrays, drawn)
        given = {"bases": dsbp_jax.eigenspaces(tracked)} if self.carried else {}
        return self.method(self._own.test_steps, rate).curve(
            params, tasks, self.metrics, **given
        )


def shardings(config: FewshotConfig) -> tuple[jax.NamedSharding, jax.NamedSharding]:
    """Of arrays with a task axis, and of what is the same for all tasks."""
    splits = config.outer.task_axis in ("auto", "vmap")
    devices = jax.local_devices() if splits else jax.local_devices()[:1]
    counts = range(1, len(devices) + 1)
    number = max(count for count in counts if config.tasks % count == 0)
    axis_types = (AxisType.Auto,)
    mesh = jax.make_mesh((number,), ("task",), axis_types, devices=devices[:number])
    return jax.NamedSharding(mesh, jax.P("task")), jax.NamedSharding(mesh, jax.P())


def summary(curves: np.ndarray) -> dict[str, Any]:
    """Mean and confidence of curves `(task, step)` at their last step, and their mean.

    Example:
      >>> summary(np.array([[0.0, 1.0], [0.0, 3.0]]))
      {'mean': 2.0, 'ci95': 1.96, 'curve': [0.0, 2.0]}
    """
    last = curves[:, -1].astype(np.float64)
    error = last.std(ddof=1) / np.sqrt(len(last))
    return {
        "mean": float(last.mean()),
        "ci95": round(1.96 * float(error), 12),
        "curve": curves.mean(0, dtype=np.float64).tolist(),
    }
