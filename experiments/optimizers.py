"""The optimizers that experiments know by name, and what may be chosen of them.

`OptimizerConfig` names one of `OPTIMIZERS` (`experiments.optimizer_table`) and holds
its options, which are those of the command line; `build` puts schedule, weight decay
and perturbation around it.
"""

import dataclasses
import functools
import typing
from collections.abc import Collection
from typing import Any, Literal

import jax
import optax

import dsbp_jax
from experiments import checks
from experiments.optimizer_table import OPTIMIZERS, UNKNOWN, Uses, kernels

Backprop = Literal["plain", "spectral", "coordinates"]
BACKPROPS = typing.get_args(Backprop)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move."""

    name: str = "dsbp"
    """One of sgd, momentum, sam, spectral_sam, eigen_sam, adam, adamw, muon, soap,
    kaon, galore, subspace_adam, dsbp, dsbp_sam, dsbp_lie, spectral_muon, spectra,
    low_rank_muon, whitened_momentum, activation_whitening."""

    learning_rate: float | None = None
    """Peak learning rate. By default the one that the table has for the optimizer."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warmup."""

    warmup: float = 0.05
    """Part of the steps over which the learning rate rises linearly to its peak."""

    momentum: float = 0.9
    """Momentum of all but sgd, galore and the Adams."""

    weight_decay: float = 0.0
    """Weight decay of the kernels; biases and scales have none."""

    rank: int = 64
    """Columns of each basis, and of what the probes report."""

    source: Literal["gradient", "activation"] = "gradient"
    """What the bases of dsbp and of spectral_sam follow."""

    side: Literal["output", "input", "both"] = "output"
    """Which side of a kernel dsbp projects and spectral_sam perturbs."""

    residual: float = 0.1
    """Share of the gradient outside the basis that dsbp and subspace_adam keep; 0 is
    the rule as published, 1 makes dsbp momentum."""

    radial: float = 1.0
    """Share of what changes singular values in dsbp_lie; 0 keeps them."""

    decay: float = 0.0
    """Strength of the decay of the leading direction in dsbp."""

    refresh_every: int = 10
    """Steps between two refreshes of a basis."""

    rho: float = 0.05
    """Radius of the perturbation of the SAMs."""

    backprop: Backprop = "plain"
    """Where gradients come from: exact ones, sketches of rank columns, or coordinates
    of kernels in such columns, where weight decay is decoupled, as in adamw."""

    tracking: int | None = None
    """How many of the columns follow the gradient, the others follow the layers'
    inputs: by default none of a sketch's, half of those of coordinates."""

    random: int = 0
    """Random columns that a sketch has besides."""

    catch_up_every: int | None = None
    """Steps after which one of a sketch is exact and makes up for what the others left
    out; by default none is."""

    def __post_init__(self):
        """Checks every value."""
        checks.one_of("optimizer.name", self.name, OPTIMIZERS)
        checks.positive("optimizer.learning_rate", self.learning_rate)
        checks.one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        checks.between("optimizer.warmup", self.warmup, 0, 1)
        checks.between("optimizer.momentum", self.momentum, 0, 1)
        checks.at_least("optimizer.weight_decay", self.weight_decay, 0)
        checks.count("optimizer.rank", self.rank)
        checks.one_of("optimizer.source", self.source, ("gradient", "activation"))
        checks.one_of("optimizer.side", self.side, ("output", "input", "both"))
        checks.between("optimizer.residual", self.residual, 0, 1)
        checks.between("optimizer.radial", self.radial, 0, 1)
        checks.at_least("optimizer.decay", self.decay, 0)
        checks.count("optimizer.refresh_every", self.refresh_every)
        checks.at_least("optimizer.rho", self.rho, 0)
        checks.one_of("optimizer.backprop", self.backprop, BACKPROPS)
        if self.tracking is not None:
            checks.count("optimizer.tracking", self.tracking, 0)
            checks.between("optimizer.tracking", self.tracking, 0, self.rank)
        checks.count("optimizer.random", self.random, 0)
        if self.catch_up_every is not None:
            checks.count("optimizer.catch_up_every", self.catch_up_every, 2)
        unfit = {
            name
            for name, entry in OPTIMIZERS.items()
            # Sketched gradients have no Hessian: their derivative is not symmetric.
            if (self.backprop == "coordinates" and entry.chooses)
            or (self.backprop == "spectral" and entry.sam == "eigen")
        }
        if self.name in unfit:
            raise ValueError(
                f"optimizer.name={self.name!r} with optimizer.backprop="
                f"{self.backprop!r}; accepted are "
                f"{', '.join(n for n in OPTIMIZERS if n not in unfit)}: the others "
                "follow directions of their own"
            )

    @property
    def peak(self) -> float:
        """The peak learning rate, the table's where none was chosen."""
        if self.learning_rate is not None:
            return self.learning_rate
        return OPTIMIZERS[self.name].learning_rate

    @property
    def label(self) -> str:
        """The name, and where gradients come from if that is not the plain way."""
        return self.name + ("" if self.backprop == "plain" else f"+{self.backprop}")

    @property
    def sides(self) -> tuple[str, ...]:
        """The activations that `update` wants of each layer; none for most."""
        entry = OPTIMIZERS[self.name]
        if self.source == "gradient" or not entry.follows:
            return entry.activations
        return {"input": ("inputs",), "output": ("outputs",)}.get(
            self.side, ("inputs", "outputs")
        )


def named(config: OptimizerConfig, name: str) -> OptimizerConfig:
    """A config for another optimizer of the table.

    Args:
      config: The config. Its learning rate is kept for its own optimizer only.
      name: A name of `OPTIMIZERS`; with `+spectral`, `+coordinates` or `+plain` its
        gradients come from there.

    Returns:
      The config of that name.

    Raises:
      ValueError: If there is no such name.

    Example:
      >>> named(OptimizerConfig(), "adam+coordinates").backprop
      'coordinates'
    """
    base, _, suffix = name.rpartition("+")
    if suffix not in BACKPROPS:
        base, suffix = name, config.backprop
    checks.one_of("optimizers", base, OPTIMIZERS)
    own = config.learning_rate if base == config.name else None
    return dataclasses.replace(config, name=base, learning_rate=own, backprop=suffix)


def diagnostics(config: OptimizerConfig, opt_state: Any) -> dict[str, Any]:
    """How well the optimizer's own bases do, as JSON holds it.

    Args:
      config: The optimizer.
      opt_state: Its state.

    Returns:
      For each leaf that it tracks, on the output side where there are both, the
      captured share of the trace (the mean over batch axes) and the refreshes that
      failed. Empty for optimizers without bases.
    """
    if not OPTIMIZERS[config.name].spectral:
        return {}
    both = config.side == "both" or config.name == "dsbp_lie"
    side = "output" if both and config.name != "subspace_adam" else None
    found = jax.device_get(dsbp_jax.diagnostics(opt_state, side=side))
    return {
        path: {
            "captured": round(float(leaf.captured.mean()), 6),
            "failures": int(leaf.failures.sum()),
        }
        for path, leaf in found.items()
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
    config: OptimizerConfig,
    num_steps: int,
    *,
    peak: float | jax.Array | None = None,
    uses: Uses = UNKNOWN,
    held: Collection[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that a config names.

    Args:
      config: The optimizer and its options.
      num_steps: Steps of the whole run, for the schedule.
      peak: Peak learning rate in place of the config's; may be traced.
      uses: How the model uses its parameters, for those that are spectral.
      held: Paths of the kernels that are held in coordinates, and decay when they are
        folded.

    Returns:
      The transformation; its `update` accepts any extra argument. Its state does
      not depend on `peak`.
    """
    peak = config.peak if peak is None else peak
    schedule = learning_rate_schedule(config, num_steps, peak)
    decay = optax.identity()
    if config.backprop == "coordinates" and config.weight_decay:
        strength = config.weight_decay
        decay = optax.add_decayed_weights(
            lambda step: -strength * schedule(step),
            mask=functools.partial(kernels, held=held),
        )
        config = dataclasses.replace(config, weight_decay=0.0)
    entry = OPTIMIZERS[config.name]
    optimizer = optax.chain(entry.build(config, schedule, uses), decay)
    if entry.sam:
        optimizer = dsbp_jax.spectral_sam(
            optimizer,
            config.rho,
            mode=entry.sam,
            # dsbp has bases already.
            rank=config.rank if config.name == "spectral_sam" else None,
            source=config.source,
            side=config.side,
            refresh_every=None if entry.sam == "eigen" else config.refresh_every,
            layout=uses.layout,
        )
    return optax.with_extra_args_support(optimizer)
