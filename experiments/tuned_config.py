"""What configs have in common that say by a method how a model is tuned."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

from experiments import checks
from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender, literal
from experiments.study.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(Config):
    """A run is a method with its options, at a rate of Adam.

    Attributes:
      methods: Their names, and the fields that each takes as options of a contender.
    """

    axes: ClassVar[Mapping[str, float]] = {"rate": 3.0}
    methods: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)

    method: str
    """What is done to the model, and how it is tuned."""

    tune_rate: float
    """Adam's peak rate when it is tuned."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        checks.one_of("method", self.method, self.methods)
        checks.positive("tune_rate", self.tune_rate)
        self.data.refuse_folds()

    @property
    def label(self) -> str:
        """See `Config`."""
        return self.method

    @property
    def contender(self) -> str:
        """See `Config`: the method with all of its options."""
        options = self.methods[self.method]
        words = (f"{name}={getattr(self, name)}" for name in options)
        return ":".join(filter(None, (self.method, ",".join(words))))

    def with_contender(self, text: str) -> Self:
        """See `Config`: a method with its options, `NAME[:OPTION=VALUE,...]`."""
        method, _, words = text.partition(":")
        checks.one_of("method", method, self.methods)
        options = {}
        for word in filter(None, words.split(",")):
            name, _, value = word.partition("=")
            checks.one_of(f"option of {method}", name, self.methods[method])
            options[name] = literal(value)
            if not isinstance(getattr(self, name), str):
                checks.number(name, options[name])
        return dataclasses.replace(self, method=method, **options)

    def at(self, point: Mapping[str, int]) -> Self:
        """See `Config`."""
        rate = self.tune_rate * self.axes["rate"] ** point.get("rate", 0)
        return dataclasses.replace(self, tune_rate=float(f"{rate:.3g}"))

    def searched(self) -> dict[str, float]:
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
            steps=6,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedConfig(MethodConfig):
    """A classifier is trained, something is done to it, and a run tunes it after."""

    optimizer: str = "adam"
    """What trains the model, as text."""

    epochs: int = 5
    """Passes over its training set."""

    batch_size: int = 128
    """Images in a step of that."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            checks.count(name, getattr(self, name))
        self.trained()

    def trained(self) -> ImageConfig:
        """The run that the model comes from."""
        return ImageConfig(
            seed=self.seed,
            data=self.data,
            model=self.model,
            optimizer=Contender.parse(self.optimizer),
            probe=ProbeConfig(0),
            epochs=self.epochs,
            batch_size=self.batch_size,
        )

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(super().smoke(), epochs=1, batch_size=64)
