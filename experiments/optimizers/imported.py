"""Optimizers by dotted name: `optax.lion`, or any function `package.module.name`.

The function takes `learning_rate`, which may be a schedule, and returns a
transformation. Its other parameters are options, as far as their defaults are numbers,
texts, truth values or None. It sees parameters and gradients; what else an update of
`experiments` is given (activations, a function of gradients) it is not.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments.optimizers.optimizer import Optimizer, Positive, Strength, kernels

# No options of a text: every optimizer has them, or they are given to it.
_OWN = {field.name for field in dataclasses.fields(Optimizer)} | {"mask"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported(Optimizer):
    """An optimizer that is a function of another package.

    A subclass has the function's parameters as its fields.

    Attributes:
      function: The function.
    """

    function: ClassVar[Callable[..., Any]]

    def __post_init__(self):
        """Checks every value, and that the function makes an optimizer of them."""
        super().__post_init__()
        try:
            _try(self)
        except TypeError:  # of what has no hash
            raise ValueError(
                f"options={self}; accepted are numbers, text, tuples and None"
            ) from None

    def _transform(self, rate, uses):
        accepted = inspect.signature(self.function).parameters
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in accepted and field.name not in _OWN - {"weight_decay"}
        }
        if "mask" in accepted and "weight_decay" in accepted:
            given["mask"] = kernels
        return self.function(**given | {"learning_rate": rate})


@functools.lru_cache(maxsize=256)
def _try(optimizer: Imported) -> None:
    """Raises a `ValueError` unless a step can be made."""
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    rate = lambda count: optimizer.learning_rate * jnp.ones(())

    def step(params: Any) -> Any:
        transform = optax.with_extra_args_support(optimizer._transform(rate, None))
        return transform.update(params, transform.init(params), params)[0]

    try:
        jax.eval_shape(step, params)
    except Exception as error:  # It may be any function.
        raise ValueError(
            "accepted is a function that makes a transformation of updates and "
            f"params, but it raises {type(error).__name__}: {error}"
        ) from error


@functools.cache
def imported(name: str) -> type[Imported]:
    """The class of an optimizer by the dotted name of its function.

    Args:
      name: The module and the function in it.

    Returns:
      A class whose fields are the parameters of the function, beside what every
      optimizer has, which goes before where both have a name (`warmup`, `schedule`).
      Defaults are the function's, and 1e-3 for a rate without one; a `mask` of its
      weight decay is that of all optimizers here: kernels.

    Raises:
      ValueError: If there is no such function, or it is no optimizer.

    Example:
      >>> imported("optax.lion")(b1=0.8).b2
      0.99
    """
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(function).parameters
    except Exception as error:  # A module may raise anything when it is imported.
        raise ValueError(
            f"optimizer={name!r}; accepted are dotted names of functions: {error}"
        ) from None
    if "learning_rate" not in parameters:
        raise ValueError(
            f"optimizer={name!r}; accepted are functions of a learning_rate, not of "
            f"{', '.join(parameters)}"
        )
    rate = parameters["learning_rate"].default
    fields: list[tuple[str, Any, Any]] = [
        ("learning_rate", Positive, rate if _is_rate(rate) else 1e-3)
    ]
    for parameter in parameters.values():
        default = parameter.default
        if parameter.name == "weight_decay" and isinstance(default, numbers.Real):
            fields.append((parameter.name, Strength, float(default)))
        elif parameter.name not in _OWN and isinstance(
            default, (bool, int, float, str, type(None))
        ):
            fields.append((parameter.name, Any, default))
    made = dataclasses.make_dataclass(
        name,
        [(field, kind, dataclasses.field(default=x)) for field, kind, x in fields],
        bases=(Imported,),
        frozen=True,
        kw_only=True,
        namespace={
            "function": staticmethod(function),
            "decoupled": "weight_decay" in parameters,
        },
    )
    return made


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf
