"""What an experiment is: typed, checked on construction, written down with a run.

A `Config` determines a run up to the machine. Presets in `configs/` build one, the
command line overrides single fields, and `config.json` in the folder of a run
holds the result (`to_json`, `from_json`).
"""

import ast
import dataclasses
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import checks, models
from experiments.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images."""

    name: str = "digits"
    """Name of the data set, as experiments.data.load knows it."""

    data_dir: Annotated[
        Path | None, tyro.conf.arg(aliases=("--data-dir",), metavar="PATH")
    ] = None
    """Folder of the data sets; digits needs none."""

    download: Annotated[bool, tyro.conf.arg(aliases=("--download",))] = False
    """Download and prepare what is missing."""

    augment: bool = False
    """Shift and flip training images at random."""

    label_noise: float = 0.0
    """Share of the training labels that are wrong: another class, drawn at random."""

    split_seed: int = 0
    """Chooses the examples held out where a set has no split of its own, and the wrong
    labels; the seed of a run does not."""

    def __post_init__(self):
        """Checks every value."""
        checks.between("data.label_noise", self.label_noise, 0, 1)
        checks.count("data.split_seed", self.split_seed, 0)


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
        options[name] = _literal(text)
    return options


def _literal(text: str) -> Any:
    """The Python literal that a text is, or the text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of literals that look odd
            return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


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

    hessian_steps: int = 10
    """Lanczos restarts for the top Hessian eigenvalue, of two products each, at the
    most; 0 leaves it out."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("probe.batch_size", self.batch_size, 0)
        checks.count("probe.hessian_steps", self.hessian_steps, 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)

    epochs: int = 20
    """Passes over the training set."""

    batch_size: int = 64
    """Images in a step; the last partial batch of an epoch is left out."""

    seed: int = 0
    """Seed of initialisation, order and augmentation."""

    eval_every: int = 1
    """Epochs between evaluations; each is followed by a checkpoint."""

    def __post_init__(self):
        """Checks every value."""
        for name in ("epochs", "batch_size", "eval_every"):
            checks.count(name, getattr(self, name))
        checks.seed("seed", self.seed)

    @property
    def label(self) -> str:
        """What its runs are told apart by."""
        return self.optimizer.label


def to_json(config: Any) -> Any:
    """A config as nested dicts of what JSON knows.

    Example:
      >>> to_json(Config())["optimizer"]["momentum"]
      0.9
    """
    if dataclasses.is_dataclass(config):
        fields = dataclasses.fields(config)
        return {field.name: to_json(getattr(config, field.name)) for field in fields}
    if isinstance(config, dict):
        return {name: to_json(value) for name, value in config.items()}
    if isinstance(config, tuple):
        return [to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_json(cls: Any, values: Any) -> Any:
    """The inverse of `to_json` for a config class.

    Args:
      cls: The class, `Config` or a part of it.
      values: What `to_json` gave.

    Returns:
      The config.

    Raises:
      ValueError: If a field is unknown, or a value is not accepted.

    Example:
      >>> from_json(Config, to_json(Config())) == Config()
      True
    """
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        for name in values:
            checks.one_of(f"field of {cls.__name__}", name, hints)
        return cls(**{name: from_json(hints[name], v) for name, v in values.items()})
    if isinstance(values, dict):
        return {name: from_json(None, value) for name, value in values.items()}
    if isinstance(values, list):
        return tuple(values)
    is_path = Path in (cls, *typing.get_args(cls))
    return Path(values) if is_path and values is not None else values


def differences(new: Any, old: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, by dotted name.

    Example:
      >>> differences(Config(epochs=3), Config(epochs=5))
      {'epochs': (3, 5)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(new):
        left, right = getattr(new, field.name), getattr(old, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(left):
            found |= differences(left, right, name + ".")
        elif left != right:
            found[name] = (left, right)
    return found
