"""Checks of arguments: one clear line that names argument, value, and choices."""

import operator
from collections.abc import Sequence
from typing import Any

import jax


def positive_int(name: str, value: Any, minimum: int = 1) -> int:
    """The value as an int of at least `minimum`, or a ValueError.

    Example:
      >>> positive_int("rank", 0)
      Traceback (most recent call last):
      ...
      ValueError: rank must be an int of at least 1, got 0
    """
    hint = ""
    if isinstance(value, jax.core.Tracer):
        hint = "; under optax.inject_hyperparams pass static_args=dsbp_jax.STATIC_ARGS"
    else:
        try:
            if not isinstance(value, bool) and operator.index(value) >= minimum:
                return operator.index(value)
        except TypeError:
            pass
    raise ValueError(
        f"{name} must be an int of at least {minimum}, got {value!r}{hint}"
    )


def in_unit_interval(name: str, value: Any, *, open_left: bool = False) -> Any:
    """The value if it lies in [0, 1], or in (0, 1]; arrays are taken on trust.

    Example:
      >>> in_unit_interval("residual", 1.5)
      Traceback (most recent call last):
      ...
      ValueError: residual must be a number in [0, 1], got 1.5
    """
    if isinstance(value, jax.Array):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (open_left and value == 0):
        interval = "(0, 1]" if open_left else "[0, 1]"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return value


def non_negative(name: str, value: Any) -> Any:
    """The value if it is a finite number of at least 0; arrays are taken on trust.

    Example:
      >>> non_negative("decay", -1.0)
      Traceback (most recent call last):
      ...
      ValueError: decay must be a finite number of at least 0, got -1.0
    """
    if isinstance(value, jax.Array):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return value


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value if it is among the choices, or a ValueError.

    Example:
      >>> one_of("side", "left", ("input", "output"))
      Traceback (most recent call last):
      ...
      ValueError: side must be one of 'input', 'output', got 'left'
    """
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
    return value
