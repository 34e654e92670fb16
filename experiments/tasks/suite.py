"""A problem of the suite, under any optimizer."""

from typing import Any

import jax

import dsbp_jax
from experiments import problems
from experiments.optimizers import Uses
from experiments.study.task import Length, Metric
from experiments.suite_config import SuiteConfig
from experiments.tasks.optimized import Optimized, TrainState

EVALUATIONS = 10  # of a run, after that at the start


class SuiteTask(Optimized):
    """The `Task` of a `SuiteConfig`.

    Args:
      config: The experiment.
    """

    def __init__(self, config: SuiteConfig):
        self.problem = problems.make(config.problem)
        self._measure = jax.jit(self.problem.measure)
        super().__init__(config)
        # The optimizers' own class has an empty one.
        self.digest = self.problem.digest
        unit, chance = self.problem.unit, self.problem.chance
        self.metrics = {"loss": Metric(unit, chance, digits=5)}

    def length(self, config: SuiteConfig) -> Length:
        """See `study.task.Task`."""
        steps = config.steps or self.problem.steps
        return Length(steps, max(1, steps // EVALUATIONS))

    def fresh(self, seed: int) -> tuple[Any, Any]:
        """See `Optimized`."""
        return self.problem.init(jax.random.key(seed)), {}

    def sample(self) -> tuple[Any, ...]:
        """See `Optimized`."""
        return self.problem.batch(0, 0)

    def batch(self, config: SuiteConfig, number: int) -> tuple[Any, ...]:
        """What a step sees: the same whatever the run's length."""
        return self.problem.batch(config.seed, number)

    def loss(
        self, params: Any, rest: Any, *batch: Any
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        """See `Optimized`."""
        return self.problem.loss(params, *batch), ({}, rest)

    def uses(self) -> Uses:
        """See `Optimized`."""
        given = jax.eval_shape(lambda: self.fresh(0)[0]), *self.sample()
        uses = Uses.of(dsbp_jax.roles(self.problem.loss, *given))
        return uses if self.problem.network else uses._replace(roles=None)

    def evaluate(
        self, state: TrainState, part: str, config: SuiteConfig
    ) -> dict[str, float]:
        """See `study.task.Task`."""
        del config
        found = self._measure(self.params(state), *self.problem.parts[part])
        return {"loss": float(found)}

    def observe(self, state: TrainState) -> tuple[dict[str, Any], TrainState]:
        """See `study.task.Task`."""
        found, state = super().observe(state)
        return found | {"probe": None}, state
