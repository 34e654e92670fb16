"""The derivative rules of a call, as jaxprs that can be run at other sizes.

A `jax.custom_jvp` or `jax.custom_vjp` holds its rule as Python functions that were
bound to the sizes of the call. What they compute is had by differentiating the call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsbp_jax.layers import primitives


def derivative(equation: primitives.Equation) -> primitives.Body | None:
    """The derivative that a rule gives its call.

    Args:
      equation: A call of kind `"rule"`.

    Returns:
      Of a `custom_jvp` a jaxpr from the operands and the tangents of all that are
      floating to the tangents of the results; of a `custom_vjp` one from the operands
      and cotangents of the results to cotangents of the floating operands. None where
      it cannot be traced, or where a result is not floating.
    """
    floating = _floating(equation)
    types = [_struct(atom) for atom in equation.invars]
    if not all(map(primitives.is_inexact, equation.outvars)):
        return None

    def run(values: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
        own = list(values)
        for index, value in zip(floating, moving, strict=True):
            own[index] = value
        return primitives.bind(equation, own)

    def forwards(values: Sequence[Any], tangents: Sequence[Any]) -> Any:
        moving = [values[index] for index in floating]
        return jax.jvp(lambda *m: run(values, m), tuple(moving), tuple(tangents))[1]

    def backwards(values: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        moving = [values[index] for index in floating]
        return jax.vjp(lambda *m: run(values, m), *moving)[1](list(cotangents))

    forward = is_forward(equation)
    sources = (
        [types[index] for index in floating]
        if forward
        else [_struct(var) for var in equation.outvars]
    )
    try:
        closed = jax.make_jaxpr(forwards if forward else backwards)(types, sources)
    except Exception:  # whatever the user's rule raises: it has no derivative here
        return None
    return primitives.Body(closed.jaxpr, closed.consts)


def is_forward(equation: primitives.Equation) -> bool:
    """Whether a rule is a `custom_jvp`."""
    return "jvp" in primitives.name_of(equation)


def with_derivative(
    equation: primitives.Equation,
    function: Callable[..., list[Any]],
    rule: Callable[[Sequence[Any], Sequence[Any]], list[Any]],
    values: Sequence[Any],
) -> list[Any]:
    """Runs a function under a rule like that of `equation`.

    Args:
      equation: A call of kind `"rule"`.
      function: From a list of operands to a list of results.
      rule: What runs a jaxpr like that of `derivative`.
      values: The operands.

    Returns:
      The results.
    """
    floating = _floating(equation)

    def whole(moving: Sequence[Any]) -> list[Any]:
        own = list(values)
        for index, value in zip(floating, moving, strict=True):
            own[index] = value
        return own

    if is_forward(equation):
        forwards = jax.custom_jvp(lambda *moving: function(whole(moving)))

        @forwards.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            return forwards(*primals), rule(whole(primals), tangents)

        return forwards(*(values[index] for index in floating))
    backwards = jax.custom_vjp(lambda *moving: function(whole(moving)))
    backwards.defvjp(
        lambda *moving: (function(whole(moving)), moving),
        lambda moving, cotangents: tuple(rule(whole(moving), cotangents)),
    )
    return backwards(*(values[index] for index in floating))


def _floating(equation: primitives.Equation) -> list[int]:
    """The operands that have derivatives."""
    return [
        index
        for index, atom in enumerate(equation.invars)
        if primitives.is_inexact(atom)
    ]


def _struct(atom: Any) -> jax.ShapeDtypeStruct:
    aval = primitives.aval(atom)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
