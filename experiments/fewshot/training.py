"""The outer loop: steps, validations, checkpoints, and the test at the end."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.progress import Progress

import dsbp_jax
from experiments import data, runs
from experiments.fewshot.config import SINE, FewshotConfig
from experiments.fewshot.learner import Learner, MetaState
from experiments.loop import Diverged

LOOK_EVERY = 1.0  # seconds, about, between two looks at the loss and the clock
MOST_STEPS = 50  # and outer steps at most


def make_learner(config: FewshotConfig) -> Learner:
    """Loads what a config names and compiles its steps."""
    dataset = None
    if config.data.name != SINE:
        dataset = data.load_fewshot(
            config.data.name,
            data_dir=config.data.data_dir,
            download=config.data.download,
        )
    return Learner(config, dataset)


def train(
    learner: Learner,
    state: MetaState,
    *,
    until: int,
    seed: int,
    seconds: float = math.inf,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[MetaState, float, float]:
    """Outer steps up to a number, or for so much time.

    Args:
      learner: The compiled steps.
      state: The state before them, whose buffers are reused.
      until: The number of the last step.
      seed: Seed of the tasks.
      seconds: Stop after the first look at the clock that finds so much spent.
      advance: Told how many steps were done, now and then.

    Returns:
      The state after them, their mean loss, and the seconds that they took.

    Raises:
      Diverged: If a loss is not finite.
    """
    began, first = time.perf_counter(), int(state.step)
    looked, window = began, 1
    losses: list[float] = []
    while first + len(losses) < until:
        at = first + len(losses)
        pending = []
        for step in range(at, min(at + window, until)):
            state, loss = learner.step(state, learner.draw(seed, step), step)
            pending.append(loss)
        # The host waits for the device at each look only.
        for loss in jax.device_get(pending):
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"the meta-loss is {losses[-1]} at outer step "
                    f"{first + len(losses)}; try a lower inner.learning_rate than "
                    f"{learner.config.inner.learning_rate:g}, or a lower outer.clip"
                )
        advance(len(pending))
        now = time.perf_counter()
        if now - began >= seconds:
            break
        fits = len(pending) * LOOK_EVERY / (now - looked)
        looked, window = now, max(1, min(MOST_STEPS, int(fits)))
    mean = math.fsum(losses) / max(1, len(losses))
    return state, mean, time.perf_counter() - began


def run_experiment(run: runs.Run, learner: Learner, progress: Progress) -> None:
    """Trains, validates and tests; goes on from the last checkpoint if there is one.

    Args:
      run: The folder, and the config in it.
      learner: The steps of that config.
      progress: Where to show how far it is.

    Raises:
      Diverged: If a loss is not finite.
    """
    config: FewshotConfig = run.config
    outer = config.outer
    state = learner.init(config.seed)
    checkpoints = runs.Checkpoints(run.path / "checkpoints")
    last = checkpoints.latest()
    run.truncate(last)
    if last is not None:
        state = checkpoints.restore(last, state=state)["state"]
    learner.compile(state)
    spent = max([record["seconds"] for record in run.records()], default=0.0)
    budget = math.inf if outer.minutes is None else 60 * outer.minutes
    task = progress.add_task(run.path.name, total=outer.steps)
    progress.advance(task, int(state.step))

    def evaluate(meta_loss: float | None) -> None:
        validation = learner.evaluate(state, "validation", config.eval_episodes)
        if not math.isfinite(validation["loss"]["mean"]):
            raise Diverged(
                f"the validation loss is {validation['loss']['mean']} after outer step "
                f"{int(state.step)}; try a lower inner.learning_rate than "
                f"{config.inner.learning_rate:g}"
            )
        run.log(
            {
                "step": int(state.step),
                "seconds": round(spent, 3),
                "meta_loss": meta_loss,
                "validation": validation,
                "bases": carried_bases(learner, state),
            }
        )
        checkpoints.save(int(state.step), state=state)

    if last is None:
        evaluate(None)
    while int(state.step) < outer.steps and spent < budget:
        state, meta_loss, seconds = train(
            learner,
            state,
            until=min(outer.steps, int(state.step) + config.eval_every),
            seed=config.seed,
            seconds=budget - spent,
            advance=lambda steps: progress.advance(task, steps),
        )
        spent += seconds
        evaluate(meta_loss)
    checkpoints.close()
    test = learner.evaluate(state, "test", config.test_episodes)
    run.log({"step": int(state.step), "seconds": round(spent, 3), "test": test})


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
