"""Running a traced function again, with its sites in other hands.

`evaluate` interprets the jaxpr of a `Trace` equation by equation. At a site it
calls `visit` instead, which may run the equation as it stands and collect
something (capture), or replace it by something with another derivative or
other parameters. Whatever is no site, and contains none, is bound unchanged.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dsbp_jax.layers import primitives
from dsbp_jax.layers.finder import Trace
from dsbp_jax.layers.product import Product
from dsbp_jax.layers.sites import Site

Visit = Callable[[Product, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Plan = dict[int, Any]  # equation or branch index -> a nested plan, or what to do
Collected = dict[str, Any]


def evaluate(
    trace: Trace,
    visit: Visit,
    args: Sequence[Any],
    extras: Mapping[str, Any] | None = None,
    *,
    sites: Iterable[Site] | None = None,
) -> tuple[list[Any], Collected]:
    """Runs a traced function with `visit` in place of its sites.

    `visit(product, x, w, extra)` is called with the operands of the site's equation
    as they are, input first, and returns its result and a pytree of arrays to
    collect (or None). `product(x, w)` runs the equation itself, all its parameters
    kept; `product.site` says which it is. `visit` must be pure: branches are traced
    twice. A fused kernel has a site for each leaf that it was joined from: the first
    visit answers for all, and the others get its result from `product(x, w)`.

    Args:
      trace: What `finder.trace` found.
      visit: The callback.
      args: The array leaves of `(params, args, kwargs)`.
      extras: Site name to a pytree of arrays for `visit`, each of shape
        `(*batch_shape, ...)`. Loops that stack the leaf slice them, so that a
        visit sees `(*batch, ...)` with the batch axes of `Operand.to_rows`.
      sites: Those to visit; all that are outside of the user's own derivative
        rules by default. Inside of one the result is always the rule's, and
        the visit's is used for nothing but what it collects.

    Returns:
      The outputs of the jaxpr, and per site name what was collected, with the
      lengths of the enclosing loops in front. Zeros where a branch was not
      taken.
    """
    if sites is None:
        sites = [site for site in trace.sites if site.rule is None]
    sites = list(sites)
    extras = extras or {}
    local = {
        site.name: jax.tree.map(site.scatter, extras[site.name])
        for site in sites
        if site.name in extras
    }
    return Interpreter(visit).run(trace.body, args, plan_of(sites), local, 0)


def plan_of(sites: Iterable[Site]) -> Plan:
    """The plan that hands these sites to `product`."""
    plan: Plan = {}
    for site in sites:
        inner = plan
        for index in site.key[:-1]:
            inner = inner.setdefault(index, {})
        inner.setdefault(site.key[-1], []).append(site)
    return plan


def _sites(plan: Plan) -> list[Site]:
    """All sites of a nested plan."""
    found: list[Site] = []
    for entry in plan.values():
        if isinstance(entry, dict):
            found += _sites(entry)
        elif isinstance(entry, list):
            found += entry
    return found


class Entered(NamedTuple):
    """A call with sites inside, and all that its evaluation needs."""

    equation: primitives.Equation
    bodies: tuple[primitives.Body, ...]
    values: list[Any]
    plan: Plan
    extras: Mapping[str, Any]
    depth: int


Results = tuple[list[Any], Collected]


class Interpreter:
    """One evaluation; the methods named like a kind of call enter it.

    A plan says, by the indices of equations and branches, what is not bound as it
    stands: a dict is a call to enter, anything else is handed to `product`.
    """

    def __init__(self, visit: Visit):
        self.visit = visit

    def run(
        self,
        body: primitives.Body,
        args: Sequence[Any],
        plan: Plan,
        extras: Mapping[str, Any],
        depth: int,
    ) -> Results:
        """Evaluates one jaxpr; `depth` counts the loops around it."""
        jaxpr = body.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        collected: Collected = {}

        def read(atom: Any) -> Any:
            return atom.val if primitives.is_literal(atom) else env[atom]

        for index, equation in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in equation.invars]
            entry = plan.get(index)
            if entry is None:
                results = primitives.bind(equation, values)
                found: Collected = {}
            elif not isinstance(entry, dict):
                results, found = self.product(equation, entry, values, extras)
            else:
                call = primitives.call_of(equation)
                assert call is not None
                enter = getattr(self, call.kind)
                with primitives.context(equation):
                    results, found = enter(
                        Entered(equation, call.bodies, values, entry, extras, depth)
                    )
            collected.update(found)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars], collected

    def product(
        self,
        equation: primitives.Equation,
        sites: Sequence[Site],
        values: Sequence[Any],
        extras: Mapping[str, Any],
    ) -> Results:
        """Hands one equation to the visitor, for each leaf of its kernel."""
        x, w = values[::-1] if sites[0].position == 0 else values
        result, collected = None, {}
        for site in sites:
            product = Product(site, equation, result)
            answer, found = self.visit(product, x, w, extras.get(site.name))
            result = answer if result is None else result
            if found is not None:
                collected[site.name] = found
        return [result], collected

    def inside(
        self,
        call: Entered,
        values: Sequence[Any],
        extras: Mapping[str, Any],
        *,
        loops: int = 0,
    ) -> Results:
        """Evaluates the one body of a call."""
        return self.run(call.bodies[0], values, call.plan, extras, call.depth + loops)

    def call(self, call: Entered) -> Results:
        """Runs the body in place, between the shardings that a jit asks for."""
        values = primitives.constrain(call.equation, "in_shardings", call.values)
        outputs, found = self.inside(call, values, call.extras)
        return primitives.constrain(call.equation, "out_shardings", outputs), found

    def remat(self, call: Entered) -> Results:
        """Wraps the body in `jax.checkpoint` again, under the same policy."""
        inside = functools.partial(self.inside, call)
        options = primitives.remat_options(call.equation)
        return jax.checkpoint(inside, **options)(call.values, dict(call.extras))

    def rule(self, call: Entered) -> Results:
        """Keeps the equation, rule and all, and visits a second evaluation."""
        _, collected = self.inside(call, call.values, call.extras)
        return primitives.bind(call.equation, call.values), collected

    def scan(self, call: Entered) -> Results:
        """Scans the body again; what is collected leaves with the outputs."""
        num_consts, num_carry = primitives.scan_sizes(call.equation)
        consts, rest = call.values[:num_consts], call.values[num_consts:]
        stacked = {
            site.name: call.extras[site.name]
            for site in _sites(call.plan)
            if site.name in call.extras and site.weight.loops[call.depth] is not None
        }

        def body(carry: Any, slices: Any) -> Any:
            xs, sliced = slices
            outputs, collected = self.inside(
                call, [*consts, *carry, *xs], {**call.extras, **sliced}, loops=1
            )
            return outputs[:num_carry], (outputs[num_carry:], collected)

        carry, (outputs, collected) = jax.lax.scan(
            body,
            rest[:num_carry],
            (rest[num_carry:], stacked),
            **primitives.scan_options(call.equation),
        )
        return [*carry, *outputs], collected

    def cond(self, call: Entered) -> Results:
        """Switches again; each branch returns zeros for the others' sites."""
        operands = call.values[1:]

        def run(branch: int, operands: Sequence[Any]) -> Results:
            plan = call.plan.get(branch, {})
            return self.run(
                call.bodies[branch], operands, plan, call.extras, call.depth
            )

        structs: dict[str, Any] = {}
        for branch in range(len(call.bodies)):
            _, found = jax.eval_shape(functools.partial(run, branch), operands)
            structs.update(found)

        def taken(branch: int, operands: Sequence[Any]) -> Results:
            outputs, found = run(branch, operands)
            missing = {
                name: jax.tree.map(primitives.zeros, struct)
                for name, struct in structs.items()
                if name not in found
            }
            return outputs, {**found, **missing}

        branches = [
            functools.partial(taken, branch) for branch in range(len(call.bodies))
        ]
        return primitives.switch(call.equation, branches, call.values)
