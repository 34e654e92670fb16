"""Walking a jaxpr forwards with something known of each value: what walks share.

A subclass says what an equation makes of what is known of its operands, and how the
calls are entered that are more than their body: loops, branches, derivative rules.
"""

from collections.abc import Sequence
from typing import Any

from dsbp_jax.layers import primitives

Key = tuple[int, ...]  # where an equation is: its indices down the calls and branches


class Forward:
    """An abstract evaluation; the methods named like a kind of call enter it.

    `scan`, `cond` and `rule` are the subclass's.
    """

    def literal(self, atom: Any) -> Any:
        """What is known of a constant that is written into an equation."""
        raise NotImplementedError

    def constant(self, var: Any) -> Any:
        """What is known of an array that a jaxpr closes over."""
        raise NotImplementedError

    def at(self, operands: Sequence[Any], key: Key) -> None:
        """Sees the operands of each equation, calls too, before it is entered."""

    def equation(
        self, equation: primitives.Equation, operands: Sequence[Any], key: Key
    ) -> Sequence[Any]:
        """From the operands of an equation that is no call to its results."""
        raise NotImplementedError

    def walk(
        self, jaxpr: primitives.Jaxpr, inputs: Sequence[Any], key: Key
    ) -> list[Any]:
        """From what is known of the inputs of a jaxpr to what is of its outputs."""
        env = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            if primitives.is_literal(atom):
                return self.literal(atom)
            if atom not in env:
                env[atom] = self.constant(atom)
            return env[atom]

        for index, equation in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in equation.invars]
            at = (*key, index)
            self.at(operands, at)
            call = primitives.call_of(equation)
            if call is None:
                results = self.equation(equation, operands, at)
            else:
                results = getattr(self, call.kind)(equation, call.bodies, operands, at)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def call(
        self, equation: Any, bodies: Any, operands: Sequence[Any], key: Key
    ) -> list[Any]:
        """A body that runs once, on the same operands."""
        return self.walk(bodies[0].jaxpr, operands, key)

    remat = call
