"""The code that the parameters of an equation hold, however it is wrapped.

What an equation runs stands in its parameters: jaxprs, containers and objects with
jaxprs inside, or Python functions, which give a jaxpr only when they are called and
cannot be looked into. What is found here is no promise of how it is run; that
`primitives.call_of` knows, for the calls that it understands.
"""

import enum
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

# What holds nothing; a mesh is a context manager that can be called as a decorator.
_ENDS = (
    type(None),
    bool | int | float | complex | str | bytes,
    enum.Enum,
    type | types.ModuleType,
    np.ndarray | np.generic | np.dtype,
    jax.Array,
    jax.sharding.Mesh | jax.sharding.AbstractMesh | jax.sharding.Sharding,
)
_FUNCTIONS = types.FunctionType | types.BuiltinFunctionType | types.MethodType


def plain(value: Any) -> jex.Jaxpr | None:
    """The jaxpr that a value is or has, without its constants.

    Args:
      value: A jaxpr, a closed one (the two are one class since jax 0.11), or an object
        with either as its attribute `jaxpr`; anything else has none.

    Returns:
      The jaxpr, or None.
    """
    for _ in range(3):
        if isinstance(value, jex.Jaxpr):
            return value
        value = getattr(value, "jaxpr", None)
    return None


def constants(value: Any) -> tuple[Any, ...]:
    """The constants of the jaxpr that a value is or has."""
    while not hasattr(value, "consts"):
        value = getattr(value, "jaxpr", None)
        if value is None:
            return ()
    return tuple(value.consts)


def inner_jaxprs(equation: jex.JaxprEqn) -> Iterator[jex.Jaxpr]:
    """The jaxprs that the parameters of `equation` hold, but for those in functions."""
    for value in _held(equation.params, {}):
        if (jaxpr := plain(value)) is not None:
            yield jaxpr


def has_constants(equation: jex.JaxprEqn) -> bool:
    """Whether a jaxpr inside of `equation`, however deep, closes over constants."""
    return any(
        bool(jaxpr.constvars) or any(map(has_constants, jaxpr.eqns))
        for jaxpr in inner_jaxprs(equation)
    )


def holds_functions(equation: jex.JaxprEqn) -> bool:
    """Whether a parameter of `equation` is a function, or an object that has one.

    It may run anything on the operands. Generators of random numbers are not counted:
    their functions are JAX's own.
    """
    if equation.primitive.name.startswith("random_"):
        return False
    return any(
        callable(value) and plain(value) is None for value in _held(equation.params, {})
    )


def _held(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """A value and what it is made of, down to jaxprs and functions."""
    if isinstance(value, _ENDS):
        return
    yield value
    if plain(value) is not None or isinstance(value, _FUNCTIONS):
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, tuple | list | set | frozenset):
        parts = list(value)
    elif id(value) in seen:  # an object may hold itself
        return
    else:
        seen[id(value)] = value
        parts = _attributes(value)
    for part in parts:
        yield from _held(part, seen)


def _attributes(value: Any) -> list[Any]:
    """What an object holds, in its dict and in slots."""
    names = dict.fromkeys(getattr(value, "__dict__", ()))
    for base in type(value).__mro__:
        slots = getattr(base, "__slots__", ())
        names.update(dict.fromkeys([slots] if isinstance(slots, str) else slots))
    return [getattr(value, name, None) for name in names]
