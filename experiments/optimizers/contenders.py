"""Contenders: an optimizer, where its gradients come from, and options, as text.

`NAME[+spectral|+coordinates|+lora][:OPTION=VALUE,...]`, such as `dsbp:rank=32` or
`adam+coordinates:rank=128`; a name with dots is that of a function, `optax.lion`.
`build` puts schedule, weight decay and perturbation around the optimizer that a
contender names.
"""

import ast
import dataclasses
import functools
import warnings
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

import dsbp_jax
from experiments import checks
from experiments.optimizers.gradients import GRADIENTS, Plain
from experiments.optimizers.imported import imported
from experiments.optimizers.optimizer import UNKNOWN, Optimizer, Uses, kernels
from experiments.optimizers.table import NAMED, OPTIMIZERS

PRODUCT = 1e-4  # of learning rate and weight decay, from where decays are searched


@dataclasses.dataclass(frozen=True)
class Contender:
    """How the parameters move.

    Attributes:
      name: Of `OPTIMIZERS` or `NAMED`, or the dotted name of a function, with
        `+spectral`, `+coordinates` or `+lora` where its gradients come from there.
      optimizer: The optimizer, with its options.
      gradients: Where its gradients come from.
    """

    name: str
    optimizer: Optimizer
    gradients: Plain

    @classmethod
    def parse(cls, text: str) -> Self:
        """The contender that a text names.

        An option that both the optimizer and its gradients have is given to both.

        Args:
          text: `NAME[+spectral|+coordinates|+lora|+plain][:OPTION=VALUE,...]`.

        Returns:
          The contender.

        Raises:
          ValueError: If a name, an option or a value is not accepted.

        Example:
          >>> contender = Contender.parse("adam+coordinates:rank=8,learning_rate=0.01")
          >>> contender.optimizer.learning_rate, contender.gradients.rank
          (0.01, 8)
          >>> contender.text
          'adam+coordinates:learning_rate=0.01,rank=8'
        """
        names, _, words = text.partition(":")
        names = names.removesuffix("+plain")
        kinds, options = _kinds(names)
        if kinds[1]().refuses(kinds[0]):
            fit = [n for n, kind in OPTIMIZERS.items() if not kinds[1]().refuses(kind)]
            raise ValueError(
                f"optimizer={names!r}; accepted with +{names.partition('+')[2]} are "
                f"{', '.join(fit)}: the others have directions of their own, or need "
                "the kernels themselves"
            )
        known = [[field.name for field in dataclasses.fields(kind)] for kind in kinds]
        accepted = dict.fromkeys([*known[0], *known[1]])
        given = dict(options)
        for word in filter(None, words.split(",")):
            option, equals, value = word.partition("=")
            if not (option and equals and value):
                raise ValueError(
                    f"optimizer={text!r}; accepted after : are words OPTION=VALUE"
                )
            checks.one_of(f"option of {names}", option, accepted)
            given[option] = literal(value)
        try:
            parts = (
                kind(**{key: value for key, value in given.items() if key in fields})
                for kind, fields in zip(kinds, known, strict=True)
            )
            return cls(names, *parts)
        except ValueError as error:
            raise ValueError(f"optimizer={text!r}: {error}") from None

    @property
    def text(self) -> str:
        """The shortest text that `parse` reads as this."""
        usual = Contender.parse(self.name)
        options = {
            field.name: getattr(mine, field.name)
            for mine, theirs in (
                (self.optimizer, usual.optimizer),
                (self.gradients, usual.gradients),
            )
            for field in dataclasses.fields(mine)
            if getattr(mine, field.name) != getattr(theirs, field.name)
        }
        words = ",".join(f"{name}={value}" for name, value in options.items())
        return self.name + (f":{words}" if words else "")

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The inverse of `study.config.to_json`."""
        optimizer, gradients = _kinds(values["name"])[0]
        return cls(
            values["name"],
            optimizer(**values["optimizer"]),
            gradients(**values["gradients"]),
        )

    def at(self, rate: int | None, decay: int | None) -> Self:
        """The contender so many neighbours from its default rate and the decay.

        Rates are 3 apart, decays 5; decay goes by its product with the rate, of which
        all contenders try the same values.
        """
        optimizer = self.optimizer
        if rate is not None:
            value = float(f"{optimizer.learning_rate * 3.0**rate:.3g}")
            optimizer = dataclasses.replace(optimizer, learning_rate=value)
        if decay is not None:
            value = float(f"{PRODUCT * 5.0**decay / optimizer.learning_rate:.3g}")
            optimizer = dataclasses.replace(optimizer, weight_decay=value)
        return dataclasses.replace(self, optimizer=optimizer)


def _kinds(names: str) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """The classes of an optimizer and its gradients by their names, and options."""
    name, _, source = names.partition("+")
    checks.one_of(f"gradients of {names}", source or "plain", GRADIENTS)
    if "." in name:
        return (imported(name), GRADIENTS[source or "plain"]), {}
    checks.one_of("optimizer", name, [*OPTIMIZERS, *NAMED])
    base, options = NAMED.get(name, (name, {}))
    return (OPTIMIZERS[base], GRADIENTS[source or "plain"]), options


def literal(text: str) -> Any:
    """The Python literal that a text is, or the text.

    Example:
      >>> literal("0.5"), literal("input"), literal("16,32")
      (0.5, 'input', (16, 32))
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of literals that look odd
            return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def diagnostics(contender: Contender, opt_state: Any) -> dict[str, Any]:
    """How well the optimizer's own bases do, as JSON holds it.

    Args:
      contender: The contender.
      opt_state: Its state.

    Returns:
      For each leaf that it tracks, on the output side where there are both, the
      captured share of the trace (the mean over batch axes) and the refreshes that
      failed. Empty for optimizers without bases.
    """
    if not contender.optimizer.spectral:
        return {}
    side = contender.optimizer.reads
    found = jax.device_get(dsbp_jax.diagnostics(opt_state, side=side))
    return {
        path: {
            "captured": round(float(leaf.captured.mean()), 6),
            "failures": int(leaf.failures.sum()),
        }
        for path, leaf in found.items()
    }


def learning_rate_schedule(
    optimizer: Optimizer, num_steps: Any, peak: Any
) -> optax.Schedule:
    """The learning rate of every step.

    Args:
      optimizer: Says which schedule, and how long its warmup.
      num_steps: Steps of the whole run; may be traced, as `peak`, so that runs of
        other lengths and rates share one compiled step.
      peak: The highest value.

    Returns:
      A function of the step's number, from 0.
    """
    warmup = jnp.minimum(jnp.round(optimizer.warmup * num_steps), num_steps - 1)

    def schedule(step: Any) -> jax.Array:
        rise = (step + 1) / (warmup + 1)
        after = jnp.ones(())
        if optimizer.schedule == "cosine":
            part = (step - warmup) / (num_steps - warmup)
            after = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(part, 0, 1)))
        return peak * jnp.where(step < warmup, rise, after)

    return schedule


def build(
    contender: Contender,
    num_steps: Any,
    *,
    peak: Any = None,
    uses: Uses = UNKNOWN,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of a contender.

    Args:
      contender: The contender.
      num_steps: Steps of the whole run, for the schedule; may be traced.
      peak: Peak learning rate in place of the contender's; may be traced.
      uses: How the model uses its parameters, for those that are spectral. Kernels
        that are held in coordinates decay when they are folded.

    Returns:
      The transformation; its `update` accepts any extra argument. Its state does not
      depend on `peak` and `num_steps`.
    """
    optimizer = contender.optimizer
    peak = optimizer.learning_rate if peak is None else peak
    schedule = learning_rate_schedule(optimizer, num_steps, peak)
    decay = optax.identity()
    in_coordinates = type(contender.gradients) is GRADIENTS["coordinates"]
    if in_coordinates and optimizer.weight_decay:
        strength = optimizer.weight_decay
        decay = optax.add_decayed_weights(
            lambda step: -strength * schedule(step),
            mask=functools.partial(kernels, held=uses.sizes),
        )
        optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
    whole = optax.chain(optimizer.build(schedule, uses), decay)
    return optax.with_extra_args_support(optimizer.perturbed(whole, uses))
