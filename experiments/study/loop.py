"""The training loop: steps, evaluations, checkpoints, and the test at the end.

`train` makes steps, up to a number or for a time; `run` is one run with its folder, new
or gone on with. Time is that of training steps: compilation, evaluations and files are
not in it.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.study.checkpoints import Checkpoints
from experiments.study.config import Config
from experiments.study.runs import Run
from experiments.study.task import Task

LOOK_EVERY = 1.0  # seconds, about, between two looks at the loss and the clock
MOST_STEPS = 50  # and steps at most


class Diverged(ArithmeticError):
    """A loss stopped being finite; the message says at which step."""


class Trained(NamedTuple):
    """What some steps came to.

    Attributes:
      state: The state after them.
      step: Its number.
      means: Of what each step reports.
      looks: Steps and seconds between two looks at the clock.
    """

    state: Any
    step: int
    means: dict[str, float]
    looks: list[tuple[int, float]]


def train(
    task: Task,
    config: Config,
    state: Any,
    *,
    first: int,
    until: int,
    seconds: float = math.inf,
    advance: Callable[[int], None] = lambda steps: None,
) -> Trained:
    """Steps up to a number, or for so much time.

    Args:
      task: The task.
      config: The run.
      state: The state before them, whose buffers are reused.
      first: The number of the first step.
      until: That after the last one.
      seconds: Stop after the first look at the clock that finds so much spent.
      advance: Told how many steps were done, now and then.

    Returns:
      What they came to.

    Raises:
      Diverged: If a loss is not finite.
    """
    looked, window, step = time.perf_counter(), 1, first
    reports: list[dict[str, float]] = []
    looks: list[tuple[int, float]] = []
    while step < until and sum(spent for _, spent in looks) < seconds:
        pending = []
        for number in range(step, min(step + window, until)):
            state, report = task.step(state, config, number)
            pending.append(report)
        # The host waits for the device at each look only.
        for report in jax.device_get(pending):
            step += 1
            reports.append({name: float(value) for name, value in report.items()})
            if not math.isfinite(reports[-1]["loss"]):
                raise Diverged(
                    f"the loss is {reports[-1]['loss']} at step {step}; "
                    f"{task.advice(config)}"
                )
        advance(len(pending))
        now = time.perf_counter()
        looks.append((len(pending), now - looked))
        fits = len(pending) * LOOK_EVERY / (now - looked)
        looked, window = now, max(1, min(MOST_STEPS, int(fits)))
    names = reports[0] if reports else ()
    means = {name: float(np.mean([r[name] for r in reports])) for name in names}
    return Trained(state, step, means, looks)


def run(
    run: Run,
    task: Task,
    *,
    test: bool = True,
    save_every: float = 0.0,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Trains, evaluates and tests; goes on from the last checkpoint if there is one.

    Args:
      run: The folder, and the config in it.
      task: The task of that config.
      test: Whether to read the test data at the end.
      save_every: Seconds between two checkpoints at the least; each is made at an
        evaluation.
      advance: Told how many steps were done, now and then.

    Raises:
      Diverged: If a loss is not finite.
    """
    config = run.config
    length = task.length(config)
    state = task.init(config)
    checkpoints = Checkpoints(run.path / "checkpoints")
    last = checkpoints.latest()
    run.truncate(last)
    if last is not None:
        state = type(state)(**checkpoints.restore(last, **state._asdict()))
    task.compile(config)
    step = last or 0
    spent = max([record["seconds"] for record in run.records()], default=0.0)
    budget = math.inf if config.minutes is None else 60 * config.minutes
    saved = time.monotonic()
    advance(step)

    def record(trained: Trained | None) -> None:
        nonlocal state, saved
        validation = measured(task, state, "validation", config, step)
        observed, state = task.observe(state)
        run.log(
            {
                "step": step,
                "seconds": round(spent, 4),
                "looks": trained.looks if trained else [],
                "train": trained.means if trained else None,
                "validation": validation,
                **observed,
            }
        )
        if time.monotonic() - saved >= save_every:
            checkpoints.save(step, **state._asdict())
            saved = time.monotonic()

    if last is None:
        record(None)
    while step < length.steps and spent < budget:
        trained = train(
            task,
            config,
            state,
            first=step,
            until=min(length.steps, (step // length.every + 1) * length.every),
            seconds=budget - spent,
            advance=advance,
        )
        state, step = trained.state, trained.step
        spent += sum(seconds for _, seconds in trained.looks)
        record(trained)
    checkpoints.close()
    end = {"step": step, "seconds": round(spent, 4)}
    if test:
        end["test"] = measured(task, state, "test", config, step)
    run.log(end | {"finished": True})


def measured(
    task: Task, state: Any, part: str, config: Config, step: int
) -> dict[str, Any]:
    """What a state comes to on a part of the data, if its loss is finite."""
    found = task.evaluate(state, part, config)
    if not math.isfinite(found["loss"]):
        raise Diverged(
            f"the {part} loss is {found['loss']} after step {step}; "
            f"{task.advice(config)}"
        )
    return found
