"""What ways to tune a model cost: before the first step, in a step, in memory."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments import checks
from experiments.bench import step
from experiments.bench.timing import Stateful, interleave
from experiments.config import ModelConfig
from experiments.tasks.transfer import TransferTask
from experiments.transfer_config import TransferConfig

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """An MLP on digits, tuned for half of the classes."""

    width: int = 1024
    """Of its two hidden layers."""

    contenders: tuple[str, ...] = (
        "full",
        "lora:rank=8",
        "spectral_lora:start=explained",
        "spectral_lora:start=null",
        "spectral_lora:start=null,train=output,rank=16",
        "spectral_transfer",
        "project_away",
    )
    """Ways to tune it."""

    rounds: int = 50
    """Steps of each that are timed, one after the other."""

    def __post_init__(self):
        """Checks every value."""
        checks.counts("tuning.width", (self.width,), checks.MOST_WIDE)
        checks.count("tuning.rounds", self.rounds)
        checks.some("tuning.contenders", self.contenders)
        for name in self.contenders:
            if TransferConfig().with_contender(name).method == "replay":
                raise ValueError(
                    f"tuning.contenders={name!r}; accepted are ways to tune whose step "
                    "sees the target alone"
                )


def run(config: TuningConfig = TuningConfig()) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's table, by title."""
    base = TransferConfig(
        model=ModelConfig("mlp", {"hidden": (config.width, config.width)}),
        epochs=1,
        labels=250,
        images=600,
    )
    begins, steps, rows = {}, {}, []
    for name in config.contenders:
        own = base.with_contender(name)
        task = TransferTask(own)
        state = task.init(own)
        compiled = task.stepper(300)
        split = task.labelled(0)
        batch = split.images[: own.tune_batch], split.labels[: own.tune_batch]
        args = (state, batch, None)
        plan = compiled.lower(*args).compile().memory_analysis()
        rows.append(
            {
                "method": name,
                "trained": sum(leaf.size for leaf in jax.tree.leaves(state.trained)),
                "state MB": step.state_bytes(state) / MEGABYTE,
                "temporary MB": plan.temp_size_in_bytes / MEGABYTE,
            }
        )
        begins[name] = lambda task=task, own=own: task.init(own)
        moved = lambda *args, compiled=compiled: compiled(*args)[0]
        steps[name] = Stateful(moved, *args)
    for name, times in (
        ("begin ms", interleave(begins, 3)),
        ("step ms", interleave(steps, config.rounds)),
    ):
        for row in rows:
            row[name] = 1e3 * float(np.median(times[row["method"]]))
    images = base.tune_batch
    title = f"Tuning an MLP of two layers {config.width} wide by {images} images a step"
    return {title: rows}
