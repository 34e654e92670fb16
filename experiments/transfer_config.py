"""The config of transfer: a model is trained, then tuned for another task."""

import dataclasses
from typing import Any, ClassVar, Self

from experiments import checks
from experiments.tuned_config import TunedConfig

#: Ways to tune, and the options of each.
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "probe": (),
    "l2sp": ("strength",),
    "ewc": ("strength",),
    "replay": ("share",),
    "lora": ("rank",),
    "spectral_lora": ("rank", "start", "train"),
    "spectral_transfer": ("strength",),
    "project_away": ("energy",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(TunedConfig):
    """A trained model, tuned for a task of few labels; a run is the tuning.

    Example:
      >>> config = TransferConfig().with_contender("l2sp:strength=0.3")
      >>> config.method, config.strength
      ('l2sp', 0.3)
      >>> TransferConfig(method="lora", rank=4).contender
      'lora:rank=4'
    """

    methods: ClassVar = METHODS

    target: str = ""
    """The set of the target, in the folder of the source's. By default the second half
    of the source's classes, and the source has the first half only."""

    labels: int = 50
    """Labelled images of the target, as many of each class."""

    method: str = "spectral_lora"
    """How it is tuned."""

    strength: float = 1.0
    """Of the penalty of l2sp, ewc or spectral_transfer."""

    rank: int = 8
    """Of lora and spectral_lora."""

    start: str = "explained"
    """Of spectral_lora: explained or null."""

    train: str = "both"
    """Of spectral_lora: both factors, or output alone."""

    energy: float = 0.95
    """Share of the source's variance that project_away protects."""

    share: float = 0.01
    """Of the source's images that replay keeps."""

    images: int = 2048
    """Source images whose activations, or gradients for ewc, are looked at."""

    source_rank: int = 64
    """Columns of the source's eigenspaces."""

    tune_steps: int = 300
    """Steps on the target, where no --steps are given."""

    tune_batch: int = 32
    """Images of such a step; all where there are fewer."""

    tune_rate: float = 1e-3
    """Adam's peak rate then."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        checks.one_of("start", self.start, ("explained", "null"))
        checks.one_of("train", self.train, ("both", "output"))
        counts = ("labels", "rank", "images", "source_rank", "tune_steps", "tune_batch")
        for name in counts:
            checks.count(name, getattr(self, name))
        checks.at_least("strength", self.strength, 0)
        for name in ("energy", "share"):
            checks.between(name, getattr(self, name), 1e-6, 1)

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(
            super().smoke(), target="", labels=20, images=100, source_rank=8
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.transfer import TransferTask

        return TransferTask(self)
