"""Where the answers of a model's sites go: to its outputs, and to each other.

Two passes over a traced function. `carrying` goes backwards and finds the sites that a
derivative of the outputs flows back to; `meetings` goes forwards and finds, for an
equation, the sites whose answers its operands are made of. Both enter what the finder
enters. Of anything else that runs a jaxpr (a `while` loop, a `shard_map`) every result
is taken to depend on every operand.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dsbp_jax.layers import primitives
from dsbp_jax.layers.forward import Forward, Key
from dsbp_jax.layers.sites import Site


class Origins(NamedTuple):
    """The sites whose answers a value depends on, as sets of bits.

    Attributes:
      free: Those that a derivative reaches: bit i for the i-th site.
      stopped: Those behind a `stop_gradient`, on one way at least.
    """

    free: int = 0
    stopped: int = 0

    def __or__(self, other: "Origins") -> "Origins":
        """Those of either."""
        return Origins(self.free | other.free, self.stopped | other.stopped)

    def stop(self) -> "Origins":
        """Behind one more `stop_gradient`."""
        return Origins(0, self.free | self.stopped)


def carrying(body: primitives.Body, sites: Iterable[Site]) -> set[Key]:
    """The sites whose answer a derivative of the function's outputs reaches.

    `stop_gradient` ends it, and so does what has no derivative, such as `argmax`. A
    function without any floating-point output is no loss: of these, integers count.

    Args:
      body: The function.
      sites: Its sites.

    Returns:
      The keys of those that carry a gradient to their weight, were it not frozen.
    """
    outputs = body.jaxpr.outvars
    anything = not any(map(primitives.is_inexact, outputs))
    walk = _Backward({site.key for site in sites}, anything)
    walk.walk(body.jaxpr, [walk.flows(var) for var in outputs], ())
    return walk.reached


def meetings(
    body: primitives.Body,
    sites: Sequence[Site],
    keys: Iterable[Key],
    others: Sequence[Key] = (),
) -> dict[Key, Origins]:
    """Which sites' answers the operands of some equations depend on.

    Args:
      body: The function.
      sites: Its sites.
      keys: Where the equations are.
      others: Where equations are that count like sites, with the bits after these.

    Returns:
      The origins of all operands together, by key.
    """
    walk = _Forward(sites, keys, others)
    walk.walk(body.jaxpr, [Origins()] * len(body.jaxpr.invars), ())
    return walk.met


class _Backward:
    """Liveness of derivatives; the methods named like a kind of call enter it."""

    def __init__(self, keys: set[Key], anything: bool):
        self.keys = keys
        self.anything = anything
        self.reached: set[Key] = set()

    def flows(self, atom: Any) -> bool:
        """Whether a value may have a derivative."""
        return self.anything or primitives.is_inexact(atom)

    def walk(
        self,
        jaxpr: primitives.Jaxpr,
        outputs: Sequence[bool],
        key: Key,
        *,
        stops: bool = True,
    ) -> list[bool]:
        """From which outputs are wanted to which inputs are."""
        live = {
            atom
            for atom, wanted in zip(jaxpr.outvars, outputs, strict=True)
            if wanted and not primitives.is_literal(atom)
        }
        for index, equation in reversed(list(enumerate(jaxpr.eqns))):
            wanted = [var in live for var in equation.outvars]
            # What is written into a reference may be read from it anywhere.
            if not any(wanted) and not any(map(primitives.is_ref, equation.invars)):
                continue
            at = (*key, index)
            if at in self.keys:
                self.reached.add(at)
            if stops and primitives.stops_gradient(equation):
                continue
            call = primitives.call_of(equation)
            if call is None:
                needed = [True] * len(equation.invars)
            else:
                enter = getattr(self, call.kind)
                needed = enter(equation, call.bodies, wanted, at, stops)
            live.update(
                atom
                for atom, need in zip(equation.invars, needed, strict=True)
                if need and not primitives.is_literal(atom) and self.flows(atom)
            )
        return [var in live for var in jaxpr.invars]

    def call(
        self, equation: Any, bodies: Any, wanted: Any, key: Key, stops: bool
    ) -> list[bool]:
        return self.walk(bodies[0].jaxpr, wanted, key, stops=stops)

    remat = call

    def rule(
        self, equation: Any, bodies: Any, wanted: Any, key: Key, stops: bool
    ) -> list[bool]:
        # The derivative is the rule's: whatever its body stops may pass.
        jaxpr = bodies[0].jaxpr
        self.walk(jaxpr, [True] * len(jaxpr.outvars), key, stops=False)
        return [True] * len(equation.invars)

    def scan(
        self, equation: Any, bodies: Any, wanted: Any, key: Key, stops: bool
    ) -> list[bool]:
        first, num_carry = primitives.scan_sizes(equation)
        wanted = list(wanted)
        while True:
            needed = self.walk(bodies[0].jaxpr, wanted, key, stops=stops)
            carried = needed[first : first + num_carry]
            both = [a or b for a, b in zip(wanted, carried, strict=False)]
            if both == wanted[:num_carry]:
                break
            wanted[:num_carry] = both
        needed[first : first + num_carry] = both
        return needed

    def cond(
        self, equation: Any, bodies: Any, wanted: Any, key: Key, stops: bool
    ) -> list[bool]:
        branches = [
            self.walk(body.jaxpr, wanted, (*key, branch), stops=stops)
            for branch, body in enumerate(bodies)
        ]
        return [False, *map(any, zip(*branches, strict=True))]


class _Forward(Forward):
    """Origins of values; the methods named like a kind of call enter it."""

    def __init__(
        self, sites: Sequence[Site], keys: Iterable[Key], others: Sequence[Key]
    ):
        self.marks = {
            key: Origins(1 << number) for number, key in enumerate(others, len(sites))
        }
        for number, site in enumerate(sites):  # of a fused kernel several at a place
            bit = 1 << number
            own = Origins(0, bit) if site.weight.frozen else Origins(bit)
            self.marks[site.key] = own | self.marks.get(site.key, _NONE)
        self.met = dict.fromkeys(keys, Origins())

    def literal(self, atom: Any) -> Origins:
        return _NONE

    def constant(self, var: Any) -> Origins:
        return _NONE

    def equation(
        self, equation: primitives.Equation, operands: Sequence[Origins], key: Key
    ) -> list[Origins]:
        union = _union(operands)
        if primitives.stops_gradient(equation):
            union = union.stop()
        return [union | self.marks.get(key, _NONE)] * len(equation.outvars)

    def at(self, operands: Sequence[Origins], key: Key) -> None:
        if key in self.met:
            self.met[key] |= _union(operands)

    def rule(
        self, equation: Any, bodies: Any, operands: Any, key: Key
    ) -> list[Origins]:
        passed = _union(operands)
        return [passed | found for found in self.call(equation, bodies, operands, key)]

    def scan(
        self, equation: Any, bodies: Any, operands: Any, key: Key
    ) -> list[Origins]:
        first, num_carry = primitives.scan_sizes(equation)
        inputs, carry = list(operands), slice(first, first + num_carry)
        while True:
            results = self.walk(bodies[0].jaxpr, inputs, key)
            both = [a | b for a, b in zip(inputs[carry], results, strict=False)]
            if both == inputs[carry]:
                return results
            inputs[carry] = both

    def cond(
        self, equation: Any, bodies: Any, operands: Any, key: Key
    ) -> list[Origins]:
        branches = [
            self.walk(body.jaxpr, operands[1:], (*key, branch))
            for branch, body in enumerate(bodies)
        ]
        chosen = operands[0].stop()  # a choice has no derivative
        return [_union((chosen, *found)) for found in zip(*branches, strict=True)]


_NONE = Origins()


def _union(origins: Iterable[Origins]) -> Origins:
    union = _NONE
    for found in origins:
        union |= found
    return union
