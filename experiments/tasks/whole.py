"""Trained models, as what other tasks begin with."""

from collections.abc import Callable
from typing import Any

import jax

from experiments import data
from experiments.config import DataConfig, ImageConfig
from experiments.study import loop
from experiments.study.config import digest, what
from experiments.tasks.images import ImageTask, load_data


def train(task: ImageTask, config: ImageConfig) -> tuple[Any, Any]:
    """Parameters and the rest of the model after a whole run.

    Raises:
      Diverged: If the training does.
    """
    steps, state = task.length(config).steps, task.init(config)
    state = loop.train(task, config, state, first=0, until=steps).state
    return task.params(state), state.rest


class Whole:
    """Models that others begin with, each trained once, whatever is done to it.

    Args:
      load: The images that a config names; by default all of the set.
    """

    def __init__(self, load: Callable[[DataConfig], data.Dataset] = load_data) -> None:
        self._load = load
        self._tasks: dict[str, ImageTask] = {}
        self._trained: dict[str, Any] = {}

    def task(self, config: ImageConfig) -> ImageTask:
        """What trains it."""
        key = digest(what(config.shared()))
        if key not in self._tasks:
            self._tasks[key] = ImageTask(config.shared(), self._load(config.data))
        return self._tasks[key]

    def arrays(self, config: ImageConfig) -> dict[str, Any]:
        """Its parameters and the rest that it needs, after training.

        Raises:
          Diverged: If its training does.
        """
        key = digest(what(config))
        if key not in self._trained:
            params, rest = train(self.task(config), config)
            self._trained[key] = jax.device_get({"params": params, "rest": rest})
        return self._trained[key]
