"""What a run is: a typed config, written down as JSON, compared field by field.

`Config` is what all tasks have; a subclass for each task adds its own. It knows how to
become another: another contender, or another point of the search for its rates.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from experiments import checks

PLACES = ("data.data_dir", "data.download")  # where, not what


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment, but for the machine.

    Attributes:
      axes: What is searched for each contender: names, and the ratio of two
        neighbours.
    """

    axes: ClassVar[Mapping[str, float]] = {}

    seed: int = 0
    """Seed of initialisation, of the order of examples and of what is random in a
    step."""

    steps: int | None = None
    """Steps of the whole run, by default as many as the preset has."""

    minutes: float | None = None
    """Stop after so much time in training steps."""

    def __post_init__(self):
        """Checks every value."""
        checks.seed("seed", self.seed)
        if self.steps is not None:
            checks.count("steps", self.steps)
        checks.positive("minutes", self.minutes)

    @property
    def label(self) -> str:
        """What its runs are told apart by."""
        raise NotImplementedError

    @property
    def contender(self) -> str:
        """What is compared, as text."""
        raise NotImplementedError

    @property
    def evaluations(self) -> int:
        """Gradient evaluations of a step."""
        return 1

    @property
    def overlap(self) -> float:
        """Test over training examples, where runs of several seeds share these."""
        return 0.0

    def with_contender(self, text: str) -> Self:
        """The config of another contender; a `ValueError` names what is wrong."""
        raise NotImplementedError

    def at(self, point: Mapping[str, int]) -> Self:
        """The config so many neighbours away from the default, by axis."""
        raise NotImplementedError

    def searched(self) -> dict[str, float]:
        """The values of what is searched."""
        raise NotImplementedError

    def shared(self) -> Self:
        """The config whose compiled steps serve this one too."""
        return dataclasses.replace(self, seed=0, steps=None, minutes=None)

    def smoke(self) -> Self:
        """A run of a second, of the same kind, without files."""
        raise NotImplementedError

    def make(self) -> Any:
        """The `Task` of it."""
        raise NotImplementedError


#: Metadata of a field that came when there were results already: at its default it is
#: not written, so that their keys hold.
LATER = {"later": True}


def to_json(config: Any) -> Any:
    """A config as nested dicts of what JSON knows.

    Example:
      >>> to_json(Config(seed=3))["seed"]
      3
    """
    if dataclasses.is_dataclass(config):
        values = {f: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {
            field.name: to_json(value)
            for field, value in values.items()
            if not (field.metadata == LATER and value == field.default)
        }
    if isinstance(config, dict):
        return {name: to_json(value) for name, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_json(cls: Any, values: Any) -> Any:
    """The inverse of `to_json` for a config class.

    Args:
      cls: The class, or the type of a field. Where a field may be of several
        dataclasses, the class says which it is (`kind`).
      values: What `to_json` gave.

    Returns:
      The config.

    Raises:
      ValueError: If a field is unknown, or a value is not accepted.

    Example:
      >>> from_json(Config, to_json(Config(seed=3))) == Config(seed=3)
      True
    """
    if hasattr(cls, "from_json"):
        return cls.from_json(values)
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        for name in values:
            checks.one_of(f"field of {cls.__name__}", name, hints)
        return cls(**{name: from_json(hints[name], v) for name, v in values.items()})
    if isinstance(values, dict):
        return {name: from_json(None, value) for name, value in values.items()}
    if isinstance(values, list):
        return tuple(from_json(None, value) for value in values)
    is_path = Path in (cls, *typing.get_args(cls))
    return Path(values) if is_path and values is not None else values


def with_places(config: Config) -> dict[str, Any]:
    """A config as JSON, with its class."""
    return {"task": type(config).__name__} | to_json(config)


def what(config: Config) -> dict[str, Any]:
    """The same without the places of its data."""
    described = with_places(config)
    for field in PLACES:
        part, name = field.split(".")
        if name in described.get(part, {}):
            del described[part][name]
    return described


def digest(value: Any) -> str:
    """A short hash of what JSON holds.

    Example:
      >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
      True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def differences(new: Any, old: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, by dotted name.

    Example:
      >>> differences(Config(seed=3), Config(seed=5))
      {'seed': (3, 5)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(new):
        left, right = getattr(new, field.name), getattr(old, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(left) and type(left) is type(right):
            found |= differences(left, right, name + ".")
        elif left != right:
            found[name] = (left, right)
    return found
