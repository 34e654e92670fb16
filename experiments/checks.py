"""Checks of user input: each names the argument, the value and what is accepted."""

import difflib
from collections.abc import Iterable
from typing import Any


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


def at_least(argument: str, value: float | None, low: float) -> None:
    """Raises a `ValueError` unless `value` is None or at least `low`."""
    if value is not None and not value >= low:
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
