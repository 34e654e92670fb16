"""Checks of arguments: one clear line that names argument, value, and choices."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def positive_int(
    name: str, value: Any, minimum: int = 1, maximum: int | None = None
) -> int:
    """The value as an int of at least `minimum`, or a ValueError.

    Example:
      >>> positive_int("rank", 0)
      Traceback (most recent call last):
      ...
      ValueError: rank must be an int of at least 1, got 0
    """
    hint = ""
    accepted = f"of at least {minimum}"
    if maximum is not None:
        accepted = f"between {minimum} and {maximum}"
    if isinstance(value, jax.core.Tracer):
        hint = (
            "; under optax.inject_hyperparams pass static_args=dsbp_jax.STATIC_ARGS, "
            "with this name where it is not among them"
        )
    elif not isinstance(value, bool | np.bool_):
        try:
            number = operator.index(value)
        except TypeError:
            number = minimum - 1
        if minimum <= number and (maximum is None or number <= maximum):
            return number
    raise ValueError(f"{name} must be an int {accepted}, got {value!r}{hint}")


def _number(name: str, value: Any, accepted: str, is_accepted: Any) -> Any:
    """The value if it is a scalar that is accepted; tracers are taken on trust."""
    if isinstance(value, jax.core.Tracer):
        return value
    scalar = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        # Not by numpy: for it bfloat16 is no number.
        kinds = (jnp.floating, jnp.integer)
        number = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        scalar = value.ndim == 0 and number
    if not scalar or not is_accepted(float(value)):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return value


def in_unit_interval(
    name: str, value: Any, *, open_left: bool = False, open_right: bool = False
) -> Any:
    """The value if it lies in [0, 1], without its open ends; tracers are trusted.

    Example:
      >>> in_unit_interval("residual", 1.5)
      Traceback (most recent call last):
      ...
      ValueError: residual must be a number in [0, 1], got 1.5
      >>> in_unit_interval("false_alarms", 0, open_left=True, open_right=True)
      Traceback (most recent call last):
      ...
      ValueError: false_alarms must be a number in (0, 1), got 0
    """
    interval = f"{'[('[open_left]}0, 1{'])'[open_right]}"
    inside = lambda x: (
        0 <= x <= 1 and not (open_left and x == 0) and not (open_right and x == 1)
    )
    return _number(name, value, f"a number in {interval}", inside)


def non_negative(name: str, value: Any) -> Any:
    """The value if it is a finite number of at least 0; tracers are taken on trust.

    Example:
      >>> non_negative("decay", -1.0)
      Traceback (most recent call last):
      ...
      ValueError: decay must be a finite number of at least 0, got -1.0
    """
    accepted = "a finite number of at least 0"
    return _number(name, value, accepted, lambda x: 0 <= x < math.inf)


def positive(name: str, value: Any) -> Any:
    """The value if it is a finite number above 0; tracers are taken on trust.

    Example:
      >>> positive("learning_rate", 0.0)
      Traceback (most recent call last):
      ...
      ValueError: learning_rate must be a finite number above 0, got 0.0
    """
    return _number(name, value, "a finite number above 0", lambda x: 0 < x < math.inf)


def finite(name: str, value: Any) -> Any:
    """The value if it is a finite number; tracers are taken on trust.

    Example:
      >>> finite("power", float("nan"))
      Traceback (most recent call last):
      ...
      ValueError: power must be a finite number, got nan
    """
    return _number(name, value, "a finite number", math.isfinite)


def at_least_one(name: str, value: Any) -> Any:
    """The value if it is a finite number of at least 1; tracers are taken on trust.

    Example:
      >>> at_least_one("every", 0)
      Traceback (most recent call last):
      ...
      ValueError: every must be a finite number of at least 1, got 0
    """
    accepted = "a finite number of at least 1"
    return _number(name, value, accepted, lambda x: 1 <= x < math.inf)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value if it is among the choices, or a ValueError.

    Example:
      >>> one_of("side", "left", ("input", "output"))
      Traceback (most recent call last):
      ...
      ValueError: side must be one of 'input', 'output', got 'left'
    """
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
    return value


def is_static(value: Any, number: float) -> bool:
    """Whether a hyperparameter is a Python number equal to `number`.

    What is known when the program is built may shape it; an array may not.

    Example:
      >>> is_static(1, 1.0), is_static(np.float32(1), 1.0)
      (True, False)
    """
    return isinstance(value, int | float) and value == number


def scalar_loss(out: Any, has_aux: bool | None = None) -> Any:
    """What a loss returned, if it is what it must be.

    Args:
      out: Arrays or their types.
      has_aux: Whether it is a pair; None where there is no such choice.

    Returns:
      The scalar.

    Raises:
      ValueError: It is none.

    Example:
      >>> scalar_loss(np.zeros(2, np.float32))
      Traceback (most recent call last):
      ...
      ValueError: loss_fn must return a floating-point scalar, got float32(2,)
    """
    pair = isinstance(out, tuple) and len(out) == 2
    value = out[0] if has_aux and pair else out
    scalar = getattr(value, "shape", None) == ()
    if (has_aux and not pair) or not (
        scalar and jnp.issubdtype(value.dtype, jnp.floating)
    ):
        kind = "a floating-point scalar"
        if has_aux:
            kind = "a pair of a floating-point scalar and anything, since has_aux=True"
        elif has_aux is not None:
            kind += ", or with has_aux=True a pair of it and more"
        is_array = lambda leaf: hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        name = lambda leaf: f"{leaf.dtype}{leaf.shape}" if is_array(leaf) else leaf
        raise ValueError(f"loss_fn must return {kind}, got {jax.tree.map(name, out)}")
    return value
