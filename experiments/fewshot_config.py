"""What a few-shot experiment is: typed, checked on construction."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from experiments import checks
from experiments.config import DataDir, Download, ModelConfig
from experiments.data import fewshot
from experiments.optimizers import literal
from experiments.study.config import LATER, Config

SINE = "sine"
METHODS = (
    "maml",
    "fomaml",
    "anil",
    "reptile",
    "spectral_maml",
    "spectral_fomaml",
    "whitened_maml",
    "whitened_fomaml",
)
OUTER = ("adam", "spectral_muon")
BASES = ("carried", "task")
SOURCES = ("activation", "gradient")


@dataclasses.dataclass(frozen=True)
class FewshotDataConfig:
    """Which tasks."""

    name: str = SINE
    """sine (regression), omniglot or cifar_fs."""

    data_dir: DataDir = None
    """Folder of the data sets; sine needs none."""

    download: Download = False
    """Download and prepare what is missing."""

    def __post_init__(self):
        """Checks every value."""
        checks.one_of("data.name", self.name, (SINE, *fewshot.NAMES))


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """The steps on one task: gradient descent."""

    learning_rate: float = 0.01
    """Step size."""

    steps: int = 1
    """Steps in training (reptile has its own)."""

    test_steps: int = 5
    """Steps in validation and test (reptile has its own)."""

    learned_rates: bool = False
    """Learn a factor of it for each leaf, as part of the start (not of reptile, which
    has no gradient for it)."""

    checkpoint: bool = False
    """Compute the inner steps again in the backward pass, to save memory."""

    def __post_init__(self):
        """Checks every value."""
        checks.positive("inner.learning_rate", self.learning_rate)
        checks.count("inner.steps", self.steps)
        checks.count("inner.test_steps", self.test_steps)


@dataclasses.dataclass(frozen=True)
class ReptileConfig:
    """What reptile does in its own way, as it has no query set to learn from."""

    tasks: int = 5
    """Tasks in an outer step."""

    steps: int = 5
    """Steps in training."""

    test_steps: int = 50
    """Steps in validation and test."""

    train_shots: int = 10
    """Examples of each class (of a task, for sine) in training, support and query set
    together, if these are not more."""

    batch_size: int = 10
    """Examples of a training step, of all classes together."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("reptile.tasks", self.tasks)
        checks.count("reptile.steps", self.steps)
        checks.count("reptile.test_steps", self.test_steps)
        checks.count("reptile.train_shots", self.train_shots, 2)
        checks.count("reptile.batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True)
class SpectralConfig:
    """The projection of inner gradients; of the methods spectral_... only.

    Of whitened_..., whose inner gradients of hidden layers are divided by their
    spectra, only the rank: that of a basis of each task.
    """

    rank: int = 16
    """Columns of each basis; layers of a smaller dimension are left alone, or whitened
    exactly."""

    residual: float = 0.1
    """Share of the complement that is kept."""

    basis: str = "carried"
    """carried: tracked in the outer loop, the same for all tasks; task: solved for in
    each task."""

    source: str = "gradient"
    """What the bases follow: gradient (the outer one where carried, else the task's)
    or activation (of the support sets)."""

    side: str = "output"
    """input or output."""

    refresh_every: int = 10
    """Outer steps between two refreshes where carried, else inner steps."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("spectral.rank", self.rank)
        checks.between("spectral.residual", self.residual, 0, 1)
        checks.one_of("spectral.basis", self.basis, BASES)
        checks.one_of("spectral.source", self.source, SOURCES)
        checks.one_of("spectral.side", self.side, ("input", "output"))
        checks.count("spectral.refresh_every", self.refresh_every)


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """The steps of the start, along the meta-gradient."""

    learning_rate: float = 1e-3
    """Step size."""

    clip: float = 10.0
    """Largest norm of the meta-gradient."""

    tasks: int = 32
    """Tasks in a step (reptile has its own)."""

    task_axis: str = "auto"
    """How tasks are run: auto, vmap, map, or a number so many at once."""

    optimizer: str = dataclasses.field(default="adam", metadata=LATER)
    """adam, or spectral_muon, which whitens the meta-gradients of hidden layers."""

    def __post_init__(self):
        """Checks every value."""
        checks.positive("outer.learning_rate", self.learning_rate)
        checks.positive("outer.clip", self.clip)
        checks.one_of("outer.optimizer", self.optimizer, OUTER)
        checks.count("outer.tasks", self.tasks)
        known = self.task_axis in ("auto", "vmap", "map")
        if not (known or (self.task_axis.isdecimal() and int(self.task_axis))):
            raise ValueError(
                f"outer.task_axis={self.task_axis!r}; accepted are auto, vmap, map or "
                "a number of tasks"
            )


@dataclasses.dataclass(frozen=True)
class FewshotConfig(Config):
    """Few-shot meta-learning."""

    axes: ClassVar[Mapping[str, float]] = {"inner": 2.5, "outer": 2.0}

    steps: int | None = dataclasses.field(default=10_000, kw_only=True)
    """Outer steps of the whole run."""

    data: FewshotDataConfig = dataclasses.field(default_factory=FewshotDataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    inner: InnerConfig = dataclasses.field(default_factory=InnerConfig)
    reptile: ReptileConfig = dataclasses.field(default_factory=ReptileConfig)
    spectral: SpectralConfig = dataclasses.field(default_factory=SpectralConfig)
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)

    method: str = "maml"
    """maml, fomaml, anil, reptile, and of the first two spectral_ and whitened_."""

    ways: int = 5
    """Classes of a task; sine has none."""

    shots: int = 1
    """Examples of each class to adapt to; of a task, for sine."""

    queries: int | None = None
    """Examples of each class to be judged by (of a task, for sine); by default as many
    as shots. They share their batch statistics, one more reason to state the number."""

    eval_every: int = 500
    """Outer steps between validations; each is followed by a checkpoint."""

    eval_episodes: int = 200
    """Tasks of a validation."""

    test_episodes: int = 600
    """Tasks of the final test."""

    def __post_init__(self):
        """Checks every value."""
        super().__post_init__()
        checks.one_of("method", self.method, METHODS)
        for name in ("ways", "eval_episodes", "test_episodes"):
            checks.count(name, getattr(self, name), 2)
        for name in ("shots", "eval_every"):
            checks.count(name, getattr(self, name))
        if self.queries is not None:
            checks.count("queries", self.queries)
        learned = self.inner.learned_rates and self.method != "reptile"
        if learned and self.outer.optimizer != "adam":
            raise ValueError(
                f"outer.optimizer={self.outer.optimizer!r}; accepted with "
                "inner.learned_rates is adam: learned rates are no part of the model"
            )
        batch = self.reptile.batch_size
        if self.method == "reptile" and self.data.name != SINE and batch % self.ways:
            raise ValueError(
                f"reptile.batch_size={batch}; accepted are multiples of "
                f"ways={self.ways}, so that a batch has as many examples of each class"
            )
        examples = self.train_examples * (1 if self.data.name == SINE else self.ways)
        if self.method == "reptile" and batch > examples:
            raise ValueError(
                f"reptile.batch_size={batch}; accepted are 1 to {examples}, the "
                "examples of a task in training"
            )

    @property
    def train_examples(self) -> int:
        """Examples of each class (of a task, for sine) in training."""
        both = self.shots + (self.queries or self.shots)
        is_reptile = self.method == "reptile"
        return max(both, self.reptile.train_shots) if is_reptile else both

    @property
    def tasks(self) -> int:
        """Tasks in an outer step of the method."""
        return (self.reptile if self.method == "reptile" else self.outer).tasks

    @property
    def label(self) -> str:
        """See `Config`."""
        ways = "" if self.data.name == SINE else f"{self.ways}way-"
        return f"{ways}{self.shots}shot-{self.method}"

    @property
    def contender(self) -> str:
        """See `Config`."""
        return self.method

    def with_contender(self, text: str) -> Self:
        """The config of a method, with dotted options of the config.

        Example:
          >>> config = FewshotConfig().with_contender("spectral_maml:spectral.rank=8")
          >>> config.method, config.spectral.rank
          ('spectral_maml', 8)
        """
        method, _, words = text.partition(":")
        changed: dict[str, dict[str, Any]] = {}
        known = [
            f"{part.name}.{field.name}"
            for part in dataclasses.fields(self)
            if part.name in ("inner", "reptile", "spectral", "outer")
            for field in dataclasses.fields(getattr(self, part.name))
        ]
        if method.startswith("whitened_"):  # which have a rank only
            others = [name for name in known if not name.startswith("spectral.")]
            known = [*others, "spectral.rank"]
        for word in filter(None, words.split(",")):
            name, _, value = word.partition("=")
            part, _, field = name.partition(".")
            checks.one_of(f"option of {method}", name, known)
            changed.setdefault(part, {})[field] = literal(value)
        parts = {
            part: dataclasses.replace(getattr(self, part), **fields)
            for part, fields in changed.items()
        }
        return dataclasses.replace(self, method=method, **parts)

    def at(self, point: Mapping[str, int]) -> Self:
        """See `Config`."""
        changed = {}
        for axis, ratio in self.axes.items():
            part = getattr(self, axis)
            rate = float(f"{part.learning_rate * ratio ** point.get(axis, 0):.3g}")
            changed[axis] = dataclasses.replace(part, learning_rate=rate)
        return dataclasses.replace(self, **changed)

    def searched(self) -> dict[str, float]:
        """See `Config`."""
        return {axis: getattr(self, axis).learning_rate for axis in self.axes}

    def shared(self) -> Self:
        """See `Config`."""
        parts = {
            name: dataclasses.replace(getattr(self, name), learning_rate=1.0)
            for name in self.axes
        }
        return dataclasses.replace(super().shared(), **parts)

    def smoke(self) -> Self:
        """See `Config`."""
        return dataclasses.replace(
            self,
            data=FewshotDataConfig(),
            model=ModelConfig("mlp", {"hidden": (8,)}),
            spectral=dataclasses.replace(self.spectral, rank=2),
            inner=dataclasses.replace(self.inner, learning_rate=0.01, test_steps=2),
            outer=dataclasses.replace(self.outer, tasks=2),
            steps=3,
            minutes=None,
            eval_episodes=4,
            test_episodes=4,
        )

    def make(self) -> Any:
        """See `Config`."""
        from experiments.tasks.fewshot import FewshotTask

        return FewshotTask(self)
