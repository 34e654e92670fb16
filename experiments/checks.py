"""Checks of user input: each names the argument, the value and what is accepted."""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

MOST = 2**31 - 1  # of what is counted: numbers of steps are int32 on the device
MOST_WIDE = 2**20  # XLA ends the process where the size of an array overflows
MOST_SEED = 2**32 - 1  # the seeds that give keys of their own


def one_of(argument: str, value: Any, accepted: Iterable[Any]) -> None:
    """Raises a `ValueError` unless `value` is among `accepted`.

    Example:
      >>> one_of("optimizer.name", "adm", ["sgd", "adam"])
      Traceback (most recent call last):
      ...
      ValueError: optimizer.name='adm'; accepted are sgd, adam (nearest: adam)
    """
    accepted = [str(name) for name in accepted]
    if str(value) in accepted:
        return
    nearest = difflib.get_close_matches(str(value), accepted, n=1)
    hint = f" (nearest: {nearest[0]})" if nearest else ""
    raise ValueError(f"{argument}={value!r}; accepted are {', '.join(accepted)}{hint}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def count(argument: str, value: Any, low: int = 1, high: int = MOST) -> None:
    """Raises a `ValueError` unless `value` is a whole number from `low` to `high`.

    Example:
      >>> count("epochs", 0)
      Traceback (most recent call last):
      ...
      ValueError: epochs=0; accepted are values of 1 or more
    """
    if not _is_whole(value):
        raise ValueError(
            f"{argument}={value!r}; accepted are whole numbers of {low} or more"
        )
    at_least(argument, value, low)
    if value > high:
        raise ValueError(f"{argument}={value!r}; accepted are values up to {high}")


def counts(argument: str, values: Any, high: int = MOST) -> None:
    """Raises a `ValueError` unless `values` are whole numbers from 1, at least one.

    Example:
      >>> counts("hidden", (64, 0))
      Traceback (most recent call last):
      ...
      ValueError: hidden=(64, 0); accepted are one or more whole numbers from 1 to ...
    """
    fits = isinstance(values, Sequence) and not isinstance(values, str) and values
    if not (fits and all(_is_whole(v) and 1 <= v <= high for v in values)):
        raise ValueError(
            f"{argument}={values!r}; accepted are one or more whole numbers from 1 to "
            f"{high}"
        )


def flag(argument: str, value: Any) -> None:
    """Raises a `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument}={value!r}; accepted are True and False")


def seed(argument: str, value: Any) -> None:
    """Raises a `ValueError` unless `value` is a seed that JAX takes."""
    if not (_is_whole(value) and 0 <= value <= MOST_SEED):
        raise ValueError(
            f"{argument}={value!r}; accepted are whole numbers from 0 to {MOST_SEED}"
        )


def some(argument: str, values: Sequence[Any]) -> None:
    """Raises a `ValueError` unless there are values, each of them once."""
    if not values or len(set(values)) < len(values):
        words = " ".join(map(str, values))
        raise ValueError(
            f"{argument}={words!r}; accepted are one or more different values"
        )


def at_least(argument: str, value: float | None, low: float) -> None:
    """Raises a `ValueError` unless `value` is None or finite and at least `low`."""
    if value is not None and not low <= value < math.inf:
        raise ValueError(f"{argument}={value!r}; accepted are values of {low} or more")


def positive(argument: str, value: float | None) -> None:
    """Raises a `ValueError` unless `value` is None or greater than zero."""
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{argument}={value!r}; accepted are positive numbers")


def between(argument: str, value: float | None, low: float, high: float) -> None:
    """Raises a `ValueError` unless `value` is None or in `[low, high]`."""
    if value is not None and not low <= value <= high:
        raise ValueError(
            f"{argument}={value!r}; accepted are values from {low} to {high}"
        )


def number(argument: str, value: Any) -> None:
    """Raises a `ValueError` unless `value` is a number, and no bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{argument}={value!r}; accepted are numbers")
