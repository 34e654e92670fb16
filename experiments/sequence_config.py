"""The config of a model that learns several tasks in turn."""

import dataclasses
from typing import ClassVar, Self

from experiments import checks
from experiments.tuned_config import MethodConfig

#: Ways to learn the next task, and the options of each.
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "l2sp": ("strength",),
    "ewc": ("strength",),
    "spectral_transfer": ("strength",),
    "project_away": ("energy", "source_rank"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceConfig(MethodConfig):
    """Tasks that come one after the other, each with a head of its own.

    Of Omniglot each is an alphabet, of other sets a part of the classes.

    Example:
      >>> config = SequenceConfig().with_contender("ewc:strength=10")
      >>> config.method, config.strength
      ('ewc', 10)
    """

    methods: ClassVar = METHODS

    tasks: int = 5
    """How many; which ones, and their order, go with the seed."""

    task_steps: int = 300
    """Steps on each, where no --steps are given for all."""

    task_batch: int = 32
    """Images in a step."""

    method: str = "spectral_transfer"
    """How the next task is learned."""

    strength: float = 1.0
    """Of the penalty of l2sp, ewc or spectral_transfer."""

    energy: float = 0.95
    """Share of the earlier tasks' variance that project_away protects."""

    images: int = 2048
    """Images of each earlier task that are looked at, when it was learned."""

    source_rank: int = 64
    """Columns of the eigenspaces of a task."""

    tune_rate: float = 1e-3
    """Adam's peak rate, for each task anew."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        for name in ("task_steps", "task_batch", "source_rank"):
            checks.count(name, getattr(self, name))
        checks.count("images", self.images, 8)
        checks.count("tasks", self.tasks, 2)
        checks.at_least("strength", self.strength, 0)
        checks.between("energy", self.energy, 1e-6, 1)

    @property
    def steps_each(self) -> int:
        """Steps on a task."""
        return max(1, self.steps // self.tasks) if self.steps else self.task_steps

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(super().smoke(), tasks=3)

    def make(self):
        """See `Config`."""
        from experiments.tasks.sequence import SequenceTask

        return SequenceTask(self)
