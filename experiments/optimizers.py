"""The optimizers that experiments know by name, in one table.

Each entry of `OPTIMIZERS` says how to build the Optax transformation from an
`OptimizerConfig` and a schedule, which learning rate to start from and which to
try when it is tuned, and what one step costs in gradient evaluations. What may be
chosen on the command line is a field of `OptimizerConfig`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from experiments import checks


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move."""

    name: str = "momentum"
    """One of sgd, momentum, adam, adamw, muon, galore."""

    learning_rate: float | None = None
    """Peak learning rate. By default the one that the table has for the optimizer."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warmup."""

    warmup: float = 0.05
    """Part of the steps over which the learning rate rises linearly to its peak."""

    momentum: float = 0.9
    """Momentum, of all but sgd, adam, adamw and galore."""

    weight_decay: float = 0.0
    """Weight decay of the kernels; biases and scales have none."""

    rank: int = 64
    """Columns of a basis."""

    refresh_every: int = 10
    """Steps between two refreshes of a basis."""

    def __post_init__(self):
        """Checks every value."""
        checks.one_of("optimizer.name", self.name, OPTIMIZERS)
        checks.positive("optimizer.learning_rate", self.learning_rate)
        checks.one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        checks.between("optimizer.warmup", self.warmup, 0, 1)
        checks.between("optimizer.momentum", self.momentum, 0, 1)
        checks.at_least("optimizer.weight_decay", self.weight_decay, 0)
        checks.at_least("optimizer.rank", self.rank, 1)
        checks.at_least("optimizer.refresh_every", self.refresh_every, 1)

    @property
    def peak(self) -> float:
        """The peak learning rate, the table's where none was chosen."""
        if self.learning_rate is not None:
            return self.learning_rate
        return OPTIMIZERS[self.name].learning_rate


Build = Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An entry of the table.

    Attributes:
      build: Builds the transformation, for a config and a schedule.
      learning_rate: The peak learning rate where none is chosen.
      grid: The learning rates to try when tuning, ascending.
      evaluations: Gradient evaluations in one step.
    """

    build: Build
    learning_rate: float
    grid: tuple[float, ...]
    evaluations: int = 1


def kernels(params: Any) -> Any:
    """The mask of weight decay: True for matrices, False for biases and scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _with_decay(
    config: OptimizerConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adds the gradient of ½ weight_decay ‖W‖² before the optimizer."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    return optax.chain(decay, optimizer) if config.weight_decay else optimizer


def _sgd(config, schedule):
    return _with_decay(config, optax.sgd(schedule))


def _momentum(config, schedule):
    return _with_decay(config, optax.sgd(schedule, momentum=config.momentum))


def _adam(config, schedule):
    return _with_decay(config, optax.adam(schedule))


def _adamw(config, schedule):
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=kernels)


def _muon(config, schedule):
    return optax.contrib.muon(
        schedule,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        consistent_rms=0.2,  # updates as large as Adam's, so one rate fits both parts
    )


def _galore(config, schedule):
    return optax.contrib.galore(
        schedule,
        rank=config.rank,
        update_proj_gap=config.refresh_every,
        weight_decay=config.weight_decay,
        mask=kernels,
    )


_OF_SGD = (0.01, 0.03, 0.1, 0.3)
_OF_ADAM = (3e-4, 1e-3, 3e-3, 1e-2)

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(_sgd, 0.1, (0.03, 0.1, 0.3, 1.0)),
    "momentum": Optimizer(_momentum, 0.05, _OF_SGD),
    "adam": Optimizer(_adam, 1e-3, _OF_ADAM),
    "adamw": Optimizer(_adamw, 1e-3, _OF_ADAM),
    "muon": Optimizer(_muon, 1e-3, _OF_ADAM),
    "galore": Optimizer(_galore, 1e-3, _OF_ADAM),
}


def learning_rate_schedule(
    config: OptimizerConfig, num_steps: int, peak: float | jax.Array
) -> optax.Schedule:
    """The learning rate of every step.

    Args:
      config: Says which schedule, and how long its warmup.
      num_steps: Steps of the whole run.
      peak: The highest value; may be traced, so that runs with different rates
        share one compiled step.

    Returns:
      A function of the step's number, from 0.
    """
    warmup = min(round(config.warmup * num_steps), num_steps - 1)
    after = (
        optax.cosine_decay_schedule(1.0, num_steps - warmup)
        if config.schedule == "cosine"
        else optax.constant_schedule(1.0)
    )
    rise = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
    shape = optax.join_schedules([rise, after], [warmup]) if warmup else after
    return lambda step: peak * shape(step)


def build(
    config: OptimizerConfig, num_steps: int, peak: float | jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that a config names.

    Args:
      config: The optimizer and its options.
      num_steps: Steps of the whole run, for the schedule.
      peak: Peak learning rate in place of the config's; may be traced.

    Returns:
      The transformation; its `update` accepts any extra argument. Its state does
      not depend on `peak`.
    """
    peak = config.peak if peak is None else peak
    schedule = learning_rate_schedule(config, num_steps, peak)
    optimizer = OPTIMIZERS[config.name].build(config, schedule)
    return optax.with_extra_args_support(optimizer)
