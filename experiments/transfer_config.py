"""The config of transfer: a model is trained, then tuned for another task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from experiments import checks
from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender, literal
from experiments.study.config import Config

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


@dataclasses.dataclass(frozen=True)
class TransferConfig(Config):
    """A trained model, tuned for a task of few labels; a run is the tuning."""

    axes: ClassVar[Mapping[str, float]] = {"rate": 3.0}

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)

    target: str = ""
    """The set of the target, in the folder of the source's. By default the second half
    of the source's classes, and the source has the first half only."""

    labels: int = 50
    """Labelled images of the target, as many of each class."""

    optimizer: str = "adam"
    """What trains the source model, as text."""

    epochs: int = 5
    """Passes over the source."""

    batch_size: int = 128
    """Images of a step on the source."""

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
        checks.one_of("method", self.method, METHODS)
        checks.one_of("start", self.start, ("explained", "null"))
        checks.one_of("train", self.train, ("both", "output"))
        for name in ("labels", "epochs", "batch_size", "rank", "images", "source_rank"):
            checks.count(name, getattr(self, name))
        for name in ("tune_steps", "tune_batch"):
            checks.count(name, getattr(self, name))
        checks.at_least("strength", self.strength, 0)
        checks.positive("tune_rate", self.tune_rate)
        for name in ("energy", "share"):
            checks.between(name, getattr(self, name), 1e-6, 1)
        self.trained()

    def trained(self) -> ImageConfig:
        """The run that the source model comes from."""
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
        """See `Config`.

        Example:
          >>> TransferConfig(method="lora", rank=4).contender
          'lora:rank=4'
        """
        words = (f"{name}={getattr(self, name)}" for name in METHODS[self.method])
        return ":".join(filter(None, (self.method, ",".join(words))))

    def with_contender(self, text: str) -> Self:
        """See `Config`.

        Example:
          >>> config = TransferConfig().with_contender("l2sp:strength=0.3")
          >>> config.method, config.strength
          ('l2sp', 0.3)
        """
        method, _, words = text.partition(":")
        checks.one_of("method", method, METHODS)
        options = dict(word.partition("=")[::2] for word in words.split(",") if word)
        for name, value in options.items():
            checks.one_of(f"option of {method}", name, METHODS[method])
            options[name] = literal(value)
            if name not in ("start", "train"):
                checks.number(name, options[name])
        return dataclasses.replace(self, method=method, **options)

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
            target="",
            labels=20,
            epochs=1,
            batch_size=64,
            images=100,
            source_rank=8,
            steps=6,
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.transfer import TransferTask

        return TransferTask(self)
