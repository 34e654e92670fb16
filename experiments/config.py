"""The configs of all tasks: typed, checked on construction, written down with a run.

A config determines a run up to the machine. Presets in `configs/` build one, the
command line overrides single fields. What all configs have is in
`experiments.study.config`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro

from experiments import checks, models
from experiments.optimizers import Contender, literal
from experiments.study.config import LATER, Config

DataDir = Annotated[Path | None, tyro.conf.arg(aliases=("--data-dir",), metavar="PATH")]
Download = Annotated[bool, tyro.conf.arg(aliases=("--download",))]

_CONTENDER = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME[:OPTION=VALUE,...]",
    instance_from_str=lambda words: Contender.parse(words[0]),
    is_instance=lambda value: isinstance(value, Contender),
    str_from_instance=lambda contender: [contender.text],
)

_USUAL = Contender.parse("dsbp")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images."""

    name: str = "digits"
    """Name of the data set, as experiments.data.load knows it."""

    data_dir: DataDir = None
    """Folder of the data sets; digits needs none."""

    download: Download = False
    """Download and prepare what is missing."""

    augment: bool = False
    """Shift and flip training images at random."""

    label_noise: float = 0.0
    """Share of the training labels that are wrong: another class, drawn at random."""

    split_seed: int = 0
    """Chooses the examples held out where a set has no split of its own, and the wrong
    labels, and those that are kept; the seed of a run does not."""

    labels: int | None = dataclasses.field(default=None, metadata=LATER)
    """Training images in all, as many of each class; by default all there are."""

    folds: int | None = dataclasses.field(default=None, metadata=LATER)
    """Test on one of so many parts of training and test images together, another for
    each seed: for sets whose own test split is small, which else is tested on."""

    def __post_init__(self):
        """Checks every value."""
        checks.between("data.label_noise", self.label_noise, 0, 1)
        checks.count("data.split_seed", self.split_seed, 0)
        if self.labels is not None:
            checks.count("data.labels", self.labels)
        if self.folds is not None:
            checks.count("data.folds", self.folds, 2)
            if self.labels is not None:
                raise ValueError(
                    f"data.labels={self.labels}; accepted is None with data.folds, "
                    "whose intervals take all training images for used"
                )

    @property
    def overlap(self) -> float:
        """Test over training examples, where seeds share these; otherwise 0."""
        return 0.0 if self.folds is None else 1 / (self.folds - 1)

    def refuse_folds(self) -> None:
        """Raises a `ValueError` if there are folds, where a task has none."""
        if self.folds is not None:
            raise ValueError(
                f"data.folds={self.folds}; accepted is None: this task has no folds"
            )


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of a model from `name=value` words.

    Example:
      >>> parse_options(["channels=16,32", "hidden=64", "dtype=bfloat16"])
      {'channels': (16, 32), 'hidden': 64, 'dtype': 'bfloat16'}
    """
    options = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise ValueError(f"model.options={word!r}; accepted are words NAME=VALUE")
        if name in options:
            raise ValueError(f"model.options={word!r}; accepted is one value of {name}")
        options[name] = literal(text)
    return options


def format_options(options: dict[str, Any]) -> list[str]:
    """The inverse of `parse_options`."""
    text = lambda value: str(value).strip("()").replace(" ", "")
    return [f"{name}={text(value)}" for name, value in options.items()]


_OPTIONS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="NAME=VALUE",
    instance_from_str=parse_options,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=format_options,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: str = "mlp"
    """Name of the model, as experiments.models.build knows it."""

    options: Annotated[dict[str, Any], _OPTIONS] = dataclasses.field(
        default_factory=dict
    )
    """Options of that model, such as hidden=256,256 for an mlp."""

    def __post_init__(self):
        """Checks every value."""
        checks.one_of("model.name", self.name, models.MODELS)
        try:
            models.check(self.name, **self.options)
        except ValueError as error:
            raise ValueError(f"model.options={self.options}; {error}") from None


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """What is measured of the spectra, on a fixed batch of training images."""

    batch_size: int = 256
    """Images in the batch; 0 switches the measurements off."""

    rank: int = 64
    """Leading eigenvalues of each layer."""

    hessian_steps: int = 10
    """Lanczos restarts for the top Hessian eigenvalue, of two products each, at the
    most; 0 leaves it out."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("probe.batch_size", self.batch_size, 0)
        checks.count("probe.rank", self.rank)
        checks.count("probe.hessian_steps", self.hessian_steps, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizedConfig(Config):
    """A run whose contender is an optimizer."""

    axes: ClassVar[Mapping[str, float]] = {"rate": 3.0, "decay": 5.0}

    optimizer: Annotated[Contender, _CONTENDER] = _USUAL
    """The optimizer with its options, as text: dsbp:residual=0.5,rank=32, or
    adam+coordinates:rank=128 where its gradients come from elsewhere."""

    @property
    def label(self) -> str:
        """See `Config`."""
        return self.optimizer.name

    @property
    def contender(self) -> str:
        """See `Config`."""
        return self.optimizer.text

    @property
    def evaluations(self) -> int:
        """See `Config`."""
        return self.optimizer.optimizer.evaluations

    def with_contender(self, text: str) -> Self:
        """See `Config`."""
        return dataclasses.replace(self, optimizer=Contender.parse(text))

    def at(self, point: Mapping[str, int]) -> Self:
        """See `Config`."""
        moved = self.optimizer.at(point.get("rate"), point.get("decay"))
        return dataclasses.replace(self, optimizer=moved)

    def searched(self) -> dict[str, float]:
        """See `Config`."""
        optimizer = self.optimizer.optimizer
        found = {"rate": optimizer.learning_rate}
        return found | (
            {"decay": optimizer.weight_decay} if optimizer.weight_decay else {}
        )

    def shared(self) -> Self:
        """See `Config`."""
        optimizer = dataclasses.replace(self.optimizer.optimizer, learning_rate=1.0)
        shared = dataclasses.replace(self.optimizer, optimizer=optimizer)
        return dataclasses.replace(super().shared(), optimizer=shared)


@dataclasses.dataclass(frozen=True)
class ImageConfig(OptimizedConfig):
    """Classification of images."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)

    epochs: int = 20
    """Passes over the training set, where no --steps are given."""

    batch_size: int = 64
    """Images in a step; the last partial batch of an epoch is left out."""

    eval_every: int = 1
    """Epochs between evaluations; each is followed by a checkpoint."""

    sharpness: bool = False
    """Measure the Hessian at the end, of the training loss on --probe.batch-size
    examples: its top eigenvalue (`hessian`), found by at most --probe.hessian-steps
    restarts, and its trace (`trace`), estimated."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        for name in ("epochs", "batch_size", "eval_every"):
            checks.count(name, getattr(self, name))
        probe = self.probe
        if self.sharpness and not (probe.batch_size and probe.hessian_steps):
            raise ValueError(
                f"sharpness=True with probe.batch_size={probe.batch_size} and "
                f"probe.hessian_steps={probe.hessian_steps}; accepted are 1 or more"
            )

    @property
    def overlap(self) -> float:
        """See `Config`."""
        return self.data.overlap

    def shared(self) -> Self:
        """See `Config`: with folds, each seed has its own images."""
        shared = super().shared()
        seed = self.seed if self.data.folds else shared.seed
        return dataclasses.replace(shared, seed=seed)

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(
            self,
            data=dataclasses.replace(
                self.data, name="digits", augment=False, labels=self.data.labels and 100
            ),
            model=ModelConfig("mlp", {"hidden": (96, 96)}),  # wider than a basis
            probe=dataclasses.replace(
                self.probe, batch_size=min(16, self.probe.batch_size), hessian_steps=1
            ),
            batch_size=64,
            steps=6,
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.images import ImageTask

        return ImageTask(self)


@dataclasses.dataclass(frozen=True)
class TextConfig(OptimizedConfig):
    """A byte-level language model of the source of Python's standard library."""

    steps: int | None = dataclasses.field(default=2000, kw_only=True)
    """Steps of the whole run."""

    width: int = 128
    """Of the residual stream."""

    depth: int = 3
    """Blocks."""

    heads: int = 4
    """Attention heads; they divide the width."""

    context: int = 128
    """Bytes."""

    batch_size: int = 16
    """Windows of a step."""

    eval_every: int = 500
    """Steps between evaluations; each is followed by a checkpoint."""

    eval_windows: int = 2048
    """Windows of an evaluation."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        names = ("width", "depth", "heads", "context", "batch_size", "eval_every")
        for name in (*names, "eval_windows"):
            checks.count(name, getattr(self, name))
        if self.width % self.heads:
            raise ValueError(
                f"heads={self.heads}; accepted are divisors of width={self.width}"
            )

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(
            self, width=16, depth=1, heads=2, context=16, steps=6, eval_windows=64
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.text import TextTask

        return TextTask(self)
