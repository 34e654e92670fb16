"""What a plan is worth by the clock."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsbp_jax.architecture import examples
from dsbp_jax.architecture.compression import compiled, resized
from dsbp_jax.architecture.cuts import apply_cuts
from dsbp_jax.architecture.plans import Plan

_RUNS = 15
_SECONDS = 0.2  # of both models together, at least
_TRIES = 6


def timed(
    fn: Callable[..., Any],
    params: Any,
    plan: Plan,
    sizes: Sequence[int],
    *,
    refuse: bool,
) -> Plan:
    """A plan with the times of both models, compiled alike, runs interleaved.

    Raises:
      ValueError: `refuse`, and the smaller model is not faster at one of the sizes.
    """
    small = apply_cuts(plan.structure, params, plan.cuts)
    run = resized(fn, params, plan.cuts)
    found = {}
    for size in sizes:
        x = _sized(plan.sample, size)
        found[size] = _medians(compiled(fn, params, x), compiled(run, small, x))
    result = dataclasses.replace(plan, latency=found)
    slower = [size for size, (before, after) in found.items() if after >= before]
    if refuse and plan.cuts and slower:
        raise ValueError(
            f"the plan is not faster at a batch of {slower[0]}, though it has "
            f"{plan.flops:.0%} of the FLOPs:\n{result}"
        )
    return result


def to_latency(
    fn: Callable[..., Any],
    params: Any,
    planner: Any,
    goal: float,
    sizes: Sequence[int],
) -> Plan:
    """The plan of the most FLOPs that was seen to take at most `goal` of the time."""
    flops, nearest = goal, None
    for _ in range(_TRIES):
        try:
            smaller = planner.at(flops=flops)
        except ValueError:  # there is no smaller one
            break
        plan = timed(fn, params, smaller, sizes, refuse=False)
        ratio = max(after / before for before, after in plan.latency.values())
        if nearest is None or ratio < nearest[0]:
            nearest = ratio, plan
        if ratio <= goal:
            return plan
        flops *= 0.95 * goal / ratio
    said = f"; the nearest takes {nearest[0]:.2f}:\n{nearest[1]}" if nearest else ""
    raise ValueError(f"no plan takes latency={goal:g} of the time{said}")


def _medians(*programs: tuple[Callable[[Any], Any], Any]) -> tuple[float, float]:
    """Median seconds of two programs, each with its arguments."""
    times: list[list[float]] = [[], []]
    for function, arrays in programs:
        jax.block_until_ready(function(arrays))
    start = time.perf_counter()
    while len(times[0]) < _RUNS or time.perf_counter() - start < _SECONDS:
        for found, (function, arrays) in zip(times, programs, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(function(arrays))
            found.append(time.perf_counter() - begin)
    before, after = map(statistics.median, times)
    return before, after


def _sized(x: Any, size: int) -> Any:
    """A batch of another size: examples repeated or left out."""
    return examples.taken(x, np.arange(size) % examples.count(x))
