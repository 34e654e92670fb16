"""The config of compression: a model is trained, cut, and tuned again."""

import dataclasses
from typing import Any, ClassVar, Self

from experiments import checks
from experiments.tuned_config import TunedConfig

#: Ways to cut, ours first, and the options of each; `whole` cuts nothing.
METHODS = dict.fromkeys(
    ("spectral", "factors", "unrepaired", "l1", "magnitude", "random", "svd", "whole"),
    ("flops",),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig(TunedConfig):
    """A trained model, cut to a share of its FLOPs; a run is what tunes it after.

    Example:
      >>> config = CompressionConfig().with_contender("l1:flops=0.3")
      >>> config.method, config.flops
      ('l1', 0.3)
    """

    methods: ClassVar = METHODS

    method: str = "spectral"
    """How it is cut: spectral and factors are ours, whole is not cut."""

    flops: float = 0.5
    """Share of the FLOPs that is kept."""

    images: int = 4096
    """Training images whose activations are looked at."""

    multiple_of: int = 8
    """Of which widths are multiples."""

    tune_epochs: float = 1.0
    """Passes over the training set after the cut, where no --steps are given."""

    tune_rate: float = 3e-4
    """Adam's peak rate then."""

    timed_batch: int = 256
    """Images of a pass that is timed."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        checks.between("flops", self.flops, 0, 1)
        checks.positive("tune_epochs", self.tune_epochs)
        for name in ("images", "multiple_of", "timed_batch"):
            checks.count(name, getattr(self, name))

    @property
    def contender(self) -> str:
        """See `Config`."""
        whole = self.method == "whole"
        return self.method if whole else f"{self.method}:flops={self.flops:g}"

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(super().smoke(), images=200, timed_batch=8)

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.compression import CompressionTask

        return CompressionTask(self)
