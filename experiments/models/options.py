"""The types of models' options: each annotation holds the check of its values.

`experiments.models.check` reads them from the signature of a model, so that what is
no option of a network is found before anything is built.
"""

import contextlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments import checks

DTYPES = ("float32", "bfloat16", "float16")


def _dtype(argument: str, value: Any) -> None:
    """Raises a `ValueError` unless `value` is a dtype to compute in, or its name."""
    if not isinstance(value, str):
        with contextlib.suppress(TypeError):  # No dtype is shown as it is.
            value = jnp.dtype(value).name
    checks.one_of(argument, value, DTYPES)


Width = Annotated[int, checks.count]
OptionalWidth = Annotated[int | None, checks.count]
Widths = Annotated[Sequence[int], checks.counts]
Flag = Annotated[bool, checks.flag]
Dtype = Annotated[DTypeLike, _dtype]
