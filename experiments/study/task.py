"""What the engine asks of an experiment.

A `Task` is compiled once and shared by all runs that differ in seed, rate and length
only: `init` takes those from a config, and the state carries them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from experiments.study.config import Config


class Metric(NamedTuple):
    """How a measured number is read.

    Attributes:
      unit: Of the printed number.
      scale: From the number measured to the one printed.
      digits: Printed after the point.
      chooses: Whether rates are chosen by it; else by the first metric.
      higher: Whether more is better.
      chance: What a run that diverged counts with.
      examples: Independent examples behind a test result, where each is right or
        wrong: it has a sampling error of its own.
    """

    unit: str
    chance: float
    scale: float = 1.0
    chooses: bool = True
    digits: int = 3
    higher: bool = False
    examples: int | None = None


class Length(NamedTuple):
    """How long a run is.

    Attributes:
      steps: Steps in all.
      every: Steps between two evaluations.
    """

    steps: int
    every: int


class State(Protocol):
    """What training carries: a NamedTuple of pytrees.

    Attributes:
      step: Steps done.  # shape=(), dtype=int32
    """

    step: Any

    def _asdict(self) -> dict[str, Any]: ...


class Task(Protocol):
    """An experiment as functions.

    Attributes:
      metrics: What `evaluate` measures, by name; the first is the one that counts.
      digest: Of the data, where another machine may have others: results are compared
        at one digest only. Else empty.
    """

    metrics: Mapping[str, Metric]
    digest: str

    def length(self, config: Config) -> Length:
        """How long a run of a config is; raises a `ValueError` if it can't be."""

    def compile(self, config: Config) -> None:
        """Compiles the steps, so that no later one waits for it."""

    def init(self, config: Config) -> Any:
        """The state before the first step."""

    def step(self, state: Any, config: Config, number: int) -> tuple[Any, Any]:
        """Step `number`, from 0: the new state and a dict of scalars on the device.

        The buffers of the state are reused. Whatever is random follows from the
        config's seed and the number. The dict has `loss`.
        """

    def evaluate(self, state: Any, part: str, config: Config) -> dict[str, Any]:
        """The metrics on `"validation"` or `"test"`, as floats, and what else belongs.

        Beside the metrics there may be `curves` and `ci95`, by metric.
        """

    def observe(self, state: Any) -> tuple[dict[str, Any], Any]:
        """What else a record has, `bases` and `probe`, and the state after that."""

    def advice(self, config: Config) -> str:
        """What to try where a loss was not finite."""
