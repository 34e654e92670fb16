"""Few-shot meta-learning: a start from which a few steps on a task suffice."""

from typing import Any

import jax
import jax.numpy as jnp

import dsbp_jax
from experiments import data
from experiments.fewshot_config import SINE, FewshotConfig
from experiments.study.task import Length, Metric
from experiments.tasks.learner import Learner, MetaState

ZERO = 4.25  # squared error of answering zero: E[a²] / 2 over the waves


def load_data(config: FewshotConfig) -> data.FewShotSet | None:
    """The images that a config names; None for sine."""
    if config.data.name == SINE:
        return None
    return data.load_fewshot(
        config.data.name,
        data_dir=config.data.data_dir,
        download=config.data.download,
    )


class FewshotTask:
    """The `Task` of a `FewshotConfig`.

    Args:
      config: The experiment.

    Raises:
      ValueError: The model, the tasks or the method do not fit.
    """

    digest = ""

    def __init__(self, config: FewshotConfig):
        self.learner = Learner(config, load_data(config))
        chance = 1 / config.ways
        self.metrics = {"loss": Metric("squared error", ZERO, digits=4)}
        if config.data.name != SINE:
            self.metrics = {
                "accuracy": Metric("%", chance, 100.0, True, 2, True),
                "loss": Metric("nats", float(jnp.log(config.ways)), digits=4),
            }

    def length(self, config: FewshotConfig) -> Length:
        """See `study.task.Task`."""
        return Length(config.steps, config.eval_every)

    def compile(self, config: FewshotConfig) -> None:
        """See `study.task.Task`."""
        self.learner.compile(self.init(config))

    def init(self, config: FewshotConfig) -> MetaState:
        """See `study.task.Task`."""
        return self.learner.init(config.seed, config)

    def step(
        self, state: MetaState, config: FewshotConfig, number: int
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        """See `study.task.Task`."""
        drawn = self.learner.draw(config.seed, number)
        state, loss = self.learner.step(state, drawn, number)
        return state, {"loss": loss}

    def evaluate(
        self, state: MetaState, part: str, config: FewshotConfig
    ) -> dict[str, Any]:
        """See `study.task.Task`.

        Test tasks go with the seed, so that the spread over seeds has their part in it;
        methods share them. Rates are chosen on the same validation tasks for all.
        """
        drawn = {"part": part, "episodes": config.eval_episodes}
        if part == "test":
            drawn = {"part": part, "episodes": config.test_episodes}
            drawn["seed"] = config.seed
        measured = self.learner.evaluate(state, **drawn)
        found: dict[str, Any] = {name: measured[name]["mean"] for name in self.metrics}
        for key in ("ci95", "curve"):
            found[key] = {name: measured[name][key] for name in self.metrics}
        return found

    def observe(self, state: MetaState) -> tuple[dict[str, Any], MetaState]:
        """See `study.task.Task`."""
        return {"bases": carried_bases(self.learner, state)}, state

    def advice(self, config: FewshotConfig) -> str:
        """See `study.task.Task`."""
        return (
            f"try a lower inner.learning_rate than {config.inner.learning_rate:g}, or "
            "a lower outer.clip"
        )


def carried_bases(learner: Learner, state: MetaState) -> dict[str, dict[str, Any]]:
    """Of every basis that is carried over tasks: its spectrum and how it does."""
    if not learner.carried:
        return {}
    bases = dsbp_jax.bases(state.tracked)
    measured = dsbp_jax.diagnostics(state.tracked)
    return {
        path: {
            "values": bases[path].values.ravel().tolist(),
            "captured": float(measured[path].captured.mean()),
            "drift": float(measured[path].drift.mean()),
            "refreshes": int(measured[path].refreshes.max()),
            "failures": int(measured[path].failures.sum()),
        }
        for path in bases
    }
