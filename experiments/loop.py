"""The training loop: epochs, evaluations, probes, checkpoints, and the test at the end.

`train_epoch` is what every command shares; `run_experiment` is one run with its
folder, new or resumed.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from experiments import checks, data, optimizers, runs
from experiments.config import Config
from experiments.probes import Probe, Seen
from experiments.steps import Classifier, Trainer, TrainState

WINDOW = 50  # steps between two looks at the loss


class Diverged(ArithmeticError):
    """The loss stopped being finite; the message says at which step."""


def steps_per_epoch(dataset: data.Dataset, config: Config) -> int:
    """Whole batches in the training set.

    Raises:
      ValueError: If there is none.
    """
    steps = len(dataset.train) // config.batch_size
    if not steps:
        raise ValueError(
            f"batch_size={config.batch_size}; accepted are 1 to {len(dataset.train)}, "
            f"the training images of {dataset.name}"
        )
    return steps


def total_steps(dataset: data.Dataset, config: Config) -> int:
    """The steps of all epochs.

    Raises:
      ValueError: If there is none, or more than the device can count.
    """
    per_epoch = steps_per_epoch(dataset, config)
    if per_epoch * config.epochs > checks.MOST:
        raise ValueError(
            f"epochs={config.epochs}; accepted are up to {checks.MOST // per_epoch}, "
            f"of {per_epoch} steps each"
        )
    return per_epoch * config.epochs


def train_epoch(
    trainer: Trainer,
    state: TrainState,
    *,
    seed: int,
    epoch: int,
    peak: float,
    max_steps: int | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[TrainState, dict[str, float]]:
    """Trains for an epoch.

    Args:
      trainer: The compiled steps.
      state: The state before it, whose buffers are reused.
      seed: Seed of the order of the images and of augmentation.
      epoch: The number of the epoch, from 0.
      peak: The peak learning rate.
      max_steps: Stop the epoch early.
      advance: Told how many steps were done, now and then.

    Returns:
      The state after it, and the means of `loss` and `accuracy` before each step.

    Raises:
      Diverged: If a loss is not finite.
    """
    key, peak = jax.random.key(seed), jnp.float32(peak)
    split, size = trainer.classifier.dataset.train, trainer.config.batch_size
    batches = data.epoch_batches(split, size, seed=seed, epoch=epoch)
    first = int(state.step)
    losses: list[float] = []
    accuracies: list[float] = []
    for window in _windows(itertools.islice(batches, max_steps)):
        pending = []
        for images, labels in window:
            step = first + len(losses) + len(pending)
            state, metrics = trainer.train_step(
                state, images, labels, key, peak, step=step
            )
            pending.append(metrics)
        # The host waits for the device once in a window.
        for metrics in jax.device_get(pending):
            losses.append(float(metrics["loss"]))
            accuracies.append(float(metrics["accuracy"]))
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"the loss is {losses[-1]} at step {first + len(losses)} (epoch "
                    f"{epoch + 1}); try a lower optimizer.learning_rate than {peak:g}"
                )
        advance(len(pending))
    return state, {
        "loss": float(np.mean(losses)),
        "accuracy": float(np.mean(accuracies)),
    }


def _windows(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Groups of `WINDOW` batches, made as they are asked for."""
    for batch in batches:
        yield itertools.chain([batch], itertools.islice(batches, WINDOW - 1))


def make_trainer(dataset: data.Dataset, config: Config) -> Trainer:
    """The compiled steps of an experiment over its whole length.

    Raises:
      ValueError: If the model, the optimizer or the batch size does not fit.
    """
    num_steps = total_steps(dataset, config)
    return Trainer(Classifier(dataset, config.model), config, num_steps)


def run_experiment(run: runs.Run, trainer: Trainer, progress: Progress) -> None:
    """Trains, evaluates and tests; goes on from the last checkpoint if there is one.

    Args:
      run: The folder, and the config in it.
      trainer: The steps of that config.
      progress: Where to show how far it is.

    Raises:
      Diverged: If a loss is not finite.
    """
    config, dataset = run.config, trainer.classifier.dataset
    probe = None
    if config.probe.batch_size:
        probe = Probe(trainer.classifier, config, dataset.train)
    state = trainer.init(config.seed)
    seen = probe.init(_whole(trainer, state)) if probe else None

    checkpoints = runs.Checkpoints(run.path / "checkpoints")
    last = checkpoints.latest()
    run.truncate(last)
    if last is not None:
        restored = checkpoints.restore(last, **_items(trainer, state, seen))
        state, seen = restored["rest"]
        if state.params is None:
            state = state._replace(params=restored["params"])
    # Time goes on from where an interrupted run was.
    began = time.perf_counter() - max([r["seconds"] for r in run.records()], default=0)
    task = progress.add_task(run.path.name, total=trainer.num_steps)
    progress.advance(task, int(state.step))

    def evaluate(epoch: int, training: dict[str, float] | None) -> None:
        nonlocal seen
        validation = trainer.evaluate(state, dataset.validation)
        if not math.isfinite(validation["loss"]):
            raise Diverged(
                f"the validation loss is {validation['loss']} after step "
                f"{int(state.step)} (epoch {epoch}); try a lower "
                f"optimizer.learning_rate than {config.optimizer.peak:g}"
            )
        measured, seen = probe(_whole(trainer, state), seen) if probe else (None, seen)
        run.log(
            {
                "epoch": epoch,
                "step": int(state.step),
                "seconds": round(time.perf_counter() - began, 3),
                "train": training,
                "validation": validation,
                "bases": optimizers.diagnostics(config.optimizer, state.opt_state),
                "probe": measured,
            }
        )
        checkpoints.save(int(state.step), **_items(trainer, state, seen))

    if last is None:
        evaluate(0, None)
    done = config.epochs * int(state.step) // trainer.num_steps
    for epoch in range(done, config.epochs):
        state, training = train_epoch(
            trainer,
            state,
            seed=config.seed,
            epoch=epoch,
            peak=config.optimizer.peak,
            advance=lambda steps: progress.advance(task, steps),
        )
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            evaluate(epoch + 1, training)
    checkpoints.close()
    test = trainer.evaluate(state, dataset.test)
    run.log({"epoch": config.epochs, "step": int(state.step), "test": test})


def _whole(trainer: Trainer, state: TrainState) -> TrainState:
    """A state with the parameters themselves, for reading only."""
    return state._replace(params=trainer.params(state), carried=None)


def _items(trainer: Trainer, state: TrainState, seen: Seen | None) -> dict[str, Any]:
    """A state as the items of a checkpoint: the parameters, and all the rest."""
    rest = state
    if trainer.config.optimizer.backprop != "coordinates":
        rest = state._replace(params=None)  # they are the parameters
    return {"params": trainer.params(state), "rest": (rest, seen)}
