"""Timing on noisy machines: interleaved runs, medians, ratios in one process."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, np.ndarray]:
    """Times each function once a round, so that all meet the same disturbances.

    Args:
      functions: Functions without arguments that return arrays.
      rounds: Timed rounds, after one that is not timed.

    Returns:
      Seconds per call, shape `(rounds,)`, for each function.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for timed in [False] + [True] * rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if timed:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


class Stateful:
    """A compiled `(state, *args) -> state` step, called again and again.

    The state is donated, as a training loop would.
    """

    def __init__(self, step: Callable[..., Any], state: Any, *args: Any) -> None:
        self._step = jax.jit(step, donate_argnums=0)
        self._state = state
        self._args = args

    def __call__(self) -> Any:
        """Runs one step and returns the new state."""
        self._state = self._step(self._state, *self._args)
        return self._state
