"""The types of models' options: each annotation holds the check of its values.

`experiments.models.check` reads them from the signature of a model, so that what is
no option of a network is found before anything is built.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments import checks

DTYPES = ("float32", "bfloat16", "float16")


def _dtype(argument: str, value: Any) -> None:
    """Raises a `ValueError` unless `value` is a dtype to compute in, or its name."""
    if not (value is None or isinstance(value, str)):  # NumPy reads None as float64
        with contextlib.suppress(TypeError):  # No dtype is shown as it is.
            value = jnp.dtype(value).name
    checks.one_of(argument, value, DTYPES)


_width = functools.partial(checks.count, high=checks.MOST_WIDE)
_widths = functools.partial(checks.counts, high=checks.MOST_WIDE)

Width = Annotated[int, _width]
OptionalWidth = Annotated[int | None, _width]
Widths = Annotated[Sequence[int], _widths]
Flag = Annotated[bool, checks.flag]
Dtype = Annotated[DTypeLike, _dtype]
