"""The config of a problem of the suite."""

import dataclasses
from typing import Any, Self

from experiments import checks, problems
from experiments.config import OptimizedConfig

SMOKE = 6  # steps


@dataclasses.dataclass(frozen=True)
class SuiteConfig(OptimizedConfig):
    """A problem of seconds, under any optimizer."""

    problem: str = "ill_conditioned"
    """Name of the problem, as experiments.problems knows it."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        checks.one_of("problem", self.problem, problems.PROBLEMS)

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(self, steps=SMOKE)

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.suite import SuiteTask

        return SuiteTask(self)
