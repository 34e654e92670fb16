"""A causal Transformer on bytes: the source of Python's standard library."""

import functools
import math
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import dsbp_jax
from experiments.config import TextConfig
from experiments.data import text as texts
from experiments.models.language import BYTES, ByteTransformer
from experiments.optimizers import Uses
from experiments.study.task import Length, Metric
from experiments.tasks.optimized import Optimized, TrainState

_load = functools.lru_cache(maxsize=1)(texts.standard_library)


class TextTask(Optimized):
    """The `Task` of a `TextConfig`; its loss is in nats per byte.

    Args:
      config: The experiment.
    """

    def __init__(self, config: TextConfig):
        self.text = _load()
        self.metrics = {"loss": Metric("nats per byte", math.log(BYTES), digits=4)}
        self.digest = self.text.digest
        graph, _, _ = nnx.split(self._build(config, 0), nnx.Param, ...)
        self._graph = graph
        self.config = config
        self._mean_loss = jax.jit(lambda *args: self.loss(*args)[0])
        super().__init__(config)
        self._windows: tuple[Any, ...] = ()

    @staticmethod
    def _build(config: TextConfig, seed: int) -> ByteTransformer:
        shape = config.width, config.depth, config.heads, config.context
        return ByteTransformer(*shape, rngs=nnx.Rngs(seed))

    def length(self, config: TextConfig) -> Length:
        """See `study.task.Task`."""
        return Length(config.steps, config.eval_every)

    def fresh(self, seed: int) -> tuple[Any, Any]:
        """See `Optimized`."""
        _, params, rest = nnx.split(self._build(self.config, seed), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def sample(self) -> tuple[np.ndarray]:
        """See `Optimized`."""
        return (np.zeros((self.config.batch_size, self.config.context + 1), np.int32),)

    def batch(self, config: TextConfig, number: int) -> tuple[np.ndarray]:
        """Windows `(n, context + 1)`, int32: the same whatever the run's length."""
        block, index = divmod(number, 64)
        if self._windows[:2] != (config.seed, block):
            windows = texts.windows(
                self.text.train,
                64 * config.batch_size,
                config.context + 1,
                (config.seed, block),
            )
            self._windows = config.seed, block, windows.astype(np.int32)
        first = index * config.batch_size
        return (self._windows[2][first : first + config.batch_size],)

    def loss(
        self, params: Any, rest: Any, windows: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """See `Optimized`."""
        logits = nnx.merge(self._graph, params, rest, copy=True)(windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean(), ({}, rest)

    def uses(self) -> Uses:
        """See `Optimized`."""
        given = *jax.eval_shape(lambda: self.fresh(0)), *self.sample()
        loss = lambda *args: self.loss(*args)[0]
        return Uses.of(dsbp_jax.roles(loss, *given))

    def evaluate(
        self, state: TrainState, part: str, config: TextConfig
    ) -> dict[str, float]:
        """The mean over windows at random places, always the same."""
        params, size = self.params(state), min(64, config.eval_windows)
        chosen = texts.windows(
            getattr(self.text, part), config.eval_windows, config.context + 1, 0
        )
        groups = chosen[: len(chosen) // size * size].reshape(-1, size, chosen.shape[1])
        losses = [
            self._mean_loss(params, state.rest, group.astype(np.int32))
            for group in groups
        ]
        return {"loss": float(np.mean(jax.device_get(losses)))}
