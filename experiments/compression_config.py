"""The config of compression: a model is trained, cut, and tuned again."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from experiments import checks
from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender, literal
from experiments.study.config import Config

#: Ways to cut, ours first; `whole` cuts nothing.
METHODS = ("spectral", "unrepaired", "l1", "magnitude", "random", "svd", "whole")


@dataclasses.dataclass(frozen=True)
class CompressionConfig(Config):
    """A trained model, cut to a share of its FLOPs; a run is what tunes it after."""

    axes: ClassVar[Mapping[str, float]] = {"rate": 3.0}

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)

    optimizer: str = "adam"
    """What trains the whole model, as text."""

    epochs: int = 5
    """Passes over the training set before the cut."""

    batch_size: int = 128
    """Images in a step, before it and after it."""

    method: str = "spectral"
    """How it is cut: spectral is ours, whole is not cut."""

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
        checks.one_of("method", self.method, METHODS)
        checks.between("flops", self.flops, 0, 1)
        checks.positive("tune_epochs", self.tune_epochs)
        checks.positive("tune_rate", self.tune_rate)
        for name in ("epochs", "batch_size", "images", "multiple_of", "timed_batch"):
            checks.count(name, getattr(self, name))
        self.trained()

    def trained(self) -> ImageConfig:
        """The run that the whole model comes from."""
        return ImageConfig(
            seed=self.seed,
            data=self.data,
            model=self.model,
            optimizer=Contender.parse(self.optimizer),
            probe=ProbeConfig(0),
            epochs=self.epochs,
            batch_size=self.batch_size,
        )

    @property
    def label(self) -> str:
        """See `Config`."""
        return self.method

    @property
    def contender(self) -> str:
        """See `Config`."""
        whole = self.method == "whole"
        return self.method if whole else f"{self.method}:flops={self.flops:g}"

    def with_contender(self, text: str) -> Self:
        """See `Config`.

        Example:
          >>> config = CompressionConfig().with_contender("l1:flops=0.3")
          >>> config.method, config.flops
          ('l1', 0.3)
        """
        method, _, words = text.partition(":")
        options = dict(word.partition("=")[::2] for word in words.split(",") if word)
        for name in options:
            checks.one_of(f"option of {method}", name, ("flops",))
        changed = {name: literal(value) for name, value in options.items()}
        return dataclasses.replace(self, method=method, **changed)

    def at(self, point: Mapping[str, int]) -> Self:
        """See `Config`."""
        rate = self.tune_rate * self.axes["rate"] ** point.get("rate", 0)
        return dataclasses.replace(self, tune_rate=float(f"{rate:.3g}"))

    def setting(self) -> dict[str, float]:
        """See `Config`."""
        return {"rate": self.tune_rate}

    def shared(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(super().shared(), tune_rate=1.0)

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, name="digits"),
            model=ModelConfig("mlp", {"hidden": (32, 24)}),
            epochs=1,
            batch_size=64,
            images=200,
            timed_batch=8,
            steps=6,
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.compression import CompressionTask

        return CompressionTask(self)
