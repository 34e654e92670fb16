"""A trained classifier on a stream of shifted images, as a config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from experiments import checks
from experiments.config import ImageConfig, ModelConfig
from experiments.data.corruptions import SEVERITIES
from experiments.data.streams import SETTINGS

METHODS = (
    "none",
    "spectral",
    "batch_norm",
    "tent",
    "tent_reset",
    "t3a",
    "linear_tca",
    "full_rank",
)


@dataclasses.dataclass(frozen=True)
class ShiftedConfig(ImageConfig):
    """Images are classified as in an `ImageConfig`; then a stream comes."""

    axes: ClassVar[Mapping[str, float]] = {}

    method: str = "spectral"
    """How the model meets the stream: none, spectral (dsbp_jax.inference), batch_norm,
    tent, tent_reset, t3a, linear_tca or full_rank."""

    setting: str = "continual"
    """reset, continual, gradual, mixed, correlated, return or clean."""

    severity: int = 5
    """Of the corruptions, from 1 to 5."""

    stream_batch: int = 200
    """Images at a time."""

    images: int = 2000
    """Of each shift; at most those of the split."""

    repeats: int = 1
    """How often all shifts come."""

    models: Path = Path("runs/models")
    """Folder of trained models: each is trained once."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        self.data.refuse_folds()
        checks.one_of("method", self.method, METHODS)
        checks.one_of("setting", self.setting, SETTINGS)
        checks.one_of("severity", self.severity, SEVERITIES)
        for name in ("stream_batch", "images", "repeats"):
            checks.count(name, getattr(self, name))

    @property
    def label(self) -> str:
        """See `Config`."""
        return self.method

    @property
    def contender(self) -> str:
        """See `Config`."""
        return self.method

    @property
    def evaluations(self) -> int:
        """See `Config`."""
        return 1

    def with_contender(self, text: str) -> Self:
        """See `Config`."""
        return dataclasses.replace(self, method=text)

    def at(self, point: Mapping[str, int]) -> Self:
        """See `Config`."""
        del point
        return self

    def shared(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(self, steps=None, minutes=None)

    def training(self) -> ImageConfig:
        """How the model is trained: by epochs, for a run here is one step."""
        fields = dataclasses.fields(ImageConfig)
        values = {field.name: getattr(self, field.name) for field in fields}
        return ImageConfig(**values | {"steps": None, "minutes": None})

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(
            super().smoke(),
            model=ModelConfig("mlp", {"hidden": (16,)}),
            epochs=1,
            steps=1,
            stream_batch=16,
            images=32,
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.shifted import ShiftedTask

        return ShiftedTask(self)
