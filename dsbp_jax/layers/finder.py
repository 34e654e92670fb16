"""Finding the sites of a model: a walk over its jaxpr, without any numbers.

`trace` runs a model function abstractly and follows every parameter leaf. Where
a leaf meets data in a matrix product or an ungrouped convolution it has found a
`Site`. Every other use is written down as well, since code that replaces a
leaf (and not only its gradient) must know that there is none.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.layers import axis_roles, primitives
from dsbp_jax.layers.arrays import array_leaves as array_leaves, is_array, split_arrays
from dsbp_jax.layers.leaf_view import (
    LeafView,
    enter_shared,
    enter_stacked,
    follow,
    join,
    leave,
    whole,
)
from dsbp_jax.layers.matrix_view import MatrixView
from dsbp_jax.layers.paths import leaves_by_path
from dsbp_jax.layers.reasons import STACKED, joined, reason_of
from dsbp_jax.layers.sites import Site
from dsbp_jax.layers.uses import Lookup, Scaling, Use, settle


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced model function and what it does with its parameters.

    Attributes:
      body: The jaxpr; its inputs are the array leaves of `(params, args,
        kwargs)` in flattening order.
      leaves: Canonical path to shape and dtype, for every array leaf of params.
      sites: In the order in which the model runs them, but for further uses
        without a gradient, which come last.
      uses: Every other use of a leaf.
      lookups: Those that look up rows of one, as of an embedding.
      unflatten: Builds the function's result from the jaxpr's outputs.
    """

    body: primitives.Body
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    sites: tuple[Site, ...]
    uses: tuple[Use, ...]
    lookups: tuple[Lookup, ...]
    unflatten: Callable[[Iterable[Any]], Any]

    @property
    def out(self) -> Any:
        """What the function returns, as shapes and dtypes."""
        return self.unflatten(map(primitives.aval, self.body.jaxpr.outvars))

    def run(self, arrays: Sequence[Any]) -> Any:
        """What the function returns for the array leaves of its arguments."""
        return self.unflatten(
            jax.core.eval_jaxpr(self.body.jaxpr, self.body.consts, *arrays)
        )

    def convolutions(self) -> list[primitives.Equation]:
        """The convolutions that the function runs, with a leaf or without."""
        return [
            equation
            for equation in primitives.equations(self.body.jaxpr)
            if equation.primitive.name == primitives.CONVOLUTION
        ]


def trace(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Trace:
    """Traces `fn(params, *args, **kwargs)` and finds its sites.

    Args:
      fn: The function.
      params: Its parameters, any pytree. Leaves that are no arrays are static.
      args: Its other arguments, arrays or `jax.ShapeDtypeStruct`s; what is
        neither is static.
      kwargs: Likewise.

    Returns:
      The trace.

    Raises:
      ValueError: Two leaves, or a leaf and a further use, have one name.
    """
    arrays, rebuild = split_arrays((params, args, dict(kwargs)))
    unflatten: list[Callable[[Iterable[Any]], Any]] = []

    def flat(*values: Any) -> list[Any]:
        params, args, kwargs = rebuild(values)
        outputs, rebuild_result = split_arrays(fn(params, *args, **kwargs))
        unflatten.append(rebuild_result)
        return outputs

    closed = jax.make_jaxpr(flat)(*arrays)
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves_by_path(params).items()
        if is_array(leaf)
    }
    walk = _Walk(leaves)
    body = primitives.Body(closed.jaxpr, closed.consts)
    walk.run(body)
    sites, others = settle(body, walk.sites, walk.scalings, leaves)
    uses, lookups = (*walk.uses, *others), tuple(walk.lookups)
    return Trace(body, leaves, tuple(sites), uses, lookups, unflatten[-1])


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of a value: it comes from parameters only.

    It may be a leaf, or be joined from several.
    """

    views: tuple[LeafView, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Context:
    """Where in the calls the walk is."""

    key: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    conditional: bool = False
    platforms: tuple[str, ...] = ()
    rule: str | None = None

    def at(self, *index: int) -> "_Context":
        return dataclasses.replace(self, key=(*self.key, *index))


_Values = list[_Value | None]  # None: depends on data


class _Walk:
    """Collects sites and other uses; `run` follows one jaxpr."""

    def __init__(self, leaves: Mapping[str, jax.ShapeDtypeStruct]):
        self.paths = list(leaves)
        self.shapes = [leaf.shape for leaf in leaves.values()]
        self.floating = [
            jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves.values()
        ]
        self.sites: list[Site] = []
        self.uses: list[Use] = []
        self.scalings: list[Scaling] = []
        self.lookups: list[Lookup] = []

    def run(self, body: primitives.Body) -> None:
        """Walks the jaxpr of a whole function."""
        values: _Values = [None] * len(body.jaxpr.invars)
        for leaf, floating in enumerate(self.floating):
            if floating:
                values[leaf] = _Value((whole(leaf, self.shapes[leaf]),))
        for value in self.walk(body.jaxpr, values, _Context()):
            self.use(value, "returned by the function")

    def use(self, value: _Value | None, why: str) -> None:
        """Writes down a use of a leaf that is no site."""
        for view in value.views if value is not None else ():
            said = joined(why, self.shapes[view.leaf]) if view.spans else why
            use = Use(self.paths[view.leaf], said)
            if use not in self.uses:
                self.uses.append(use)

    def walk(
        self, jaxpr: primitives.Jaxpr, values: _Values, context: _Context
    ) -> _Values:
        """Follows the inputs of a jaxpr to its outputs."""
        env: dict[Any, _Value | None] = dict(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> _Value | None:
            # A literal is known without any data, like a parameter.
            return _Value() if primitives.is_literal(atom) else env.get(atom)

        for index, equation in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in equation.invars]
            if all(value is None for value in operands):
                continue
            results = self.equation(equation, operands, context.at(index))
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self, equation: primitives.Equation, operands: _Values, context: _Context
    ) -> _Values:
        """What is known of the results of one equation; collects on the way."""
        call = primitives.call_of(equation)
        data = any(value is None for value in operands)
        if call is None:
            data = data or primitives.brings_data(equation)
        results: _Values = [None if data else _Value()] * len(equation.outvars)
        if primitives.is_unused(equation):
            return results
        if call is not None:
            enter = getattr(self, call.kind)
            return enter(equation, call.bodies, operands, context)
        if not any(value is not None and value.views for value in operands):
            return results
        if equation.primitive.name in primitives.JOINS and not data:
            return [self.join(equation, operands)]
        if equation.primitive.name in (primitives.DENSE, primitives.CONVOLUTION):
            self.product(equation, operands, context)
            return results
        for index, value in enumerate(operands):
            if value is None or not value.views:
                continue
            views = [follow(equation, view, index) for view in value.views]
            followed = tuple(view for view in views if view is not None)
            if len(followed) < len(views):
                self.use(value, reason_of(equation))
                paths = [self.paths[view.leaf] for view in value.views]
                if equation.primitive.name in ("mul", "div"):
                    self.scalings += [Scaling(path, context.key) for path in paths]
                elif equation.primitive.name == "gather":
                    self.lookups += [Lookup(path, context.key) for path in paths]
            else:
                results[index] = _Value(followed)
        return results

    def join(self, equation: primitives.Equation, operands: _Values) -> _Value:
        """What is joined from leaves and constants, each leaf a block of it."""
        views = [
            join(equation, view, index)
            for index, value in enumerate(operands)
            if value is not None
            for view in value.views
        ]
        return _Value(tuple(view for view in views if view is not None))

    def product(
        self, equation: primitives.Equation, operands: _Values, context: _Context
    ) -> None:
        """A site of each leaf of the weight, or why this product is none."""
        position = 1 if operands[1] is not None and operands[1].views else 0
        value, other = operands[position], operands[1 - position]
        assert value is not None
        for weight in value.views:
            self.site(equation, weight, position, other, context)

    def site(
        self,
        equation: primitives.Equation,
        weight: LeafView,
        position: int,
        other: _Value | None,
        context: _Context,
    ) -> None:
        """A site, or the reason why this product of a leaf is none."""
        dense = equation.primitive.name == primitives.DENSE
        shape = self.shapes[weight.leaf]
        view: MatrixView | str
        if other is not None:
            roles: axis_roles.Roles | str = (
                "multiplied with parameters or constants only"
            )
        elif dense:
            roles = axis_roles.dense(equation, weight, position)
        else:
            roles = axis_roles.convolution(equation, weight, position)
        view = roles if isinstance(roles, str) else roles.view(shape, weight)
        if isinstance(roles, str) or isinstance(view, str):
            self.use(_Value((weight,)), str(view))
            self.use(other, str(view))
            return
        path = self.paths[weight.leaf]
        site = Site(
            name=path,
            path=path,
            kind="dense" if dense else "convolution",
            view=view,
            shape=shape,
            weight=weight,
            position=position,
            inputs=roles.inputs,
            outputs=roles.outputs,
            precision=equation.params["precision"],
            **vars(context),
        )
        self.sites.append(site)

    def call(
        self,
        equation: primitives.Equation,
        bodies: tuple[primitives.Body, ...],
        operands: _Values,
        context: _Context,
    ) -> _Values:
        """A body that runs once, on the same operands."""
        return self.walk(bodies[0].jaxpr, operands, context)

    remat = call

    def rule(
        self,
        equation: primitives.Equation,
        bodies: tuple[primitives.Body, ...],
        operands: _Values,
        context: _Context,
    ) -> _Values:
        """A body with a derivative rule: its results are the rule's."""
        rule = context.rule or primitives.name_of(equation)
        if bodies[0].jaxpr.effects:  # a second evaluation would have them twice
            for value in operands:
                self.use(value, f"inside {rule}, which has side effects")
            return [None] * len(equation.outvars)
        inner = dataclasses.replace(context, rule=rule)
        results = self.walk(bodies[0].jaxpr, operands, inner)
        for value in results:
            self.use(value, f"passed through {rule}")
        return [None if value is None else _Value() for value in results]

    def scan(
        self,
        equation: primitives.Equation,
        bodies: tuple[primitives.Body, ...],
        operands: _Values,
        context: _Context,
    ) -> _Values:
        """A loop: stacked leaves lose an axis, shared ones and carries do not.

        A carry that the loop changes counts as data, whatever it starts from.
        """
        jaxpr = bodies[0].jaxpr
        num_consts, num_carry = primitives.scan_sizes(equation)
        inner: _Values = []
        for index, value in enumerate(operands):
            views = () if value is None else value.views
            carried = num_consts <= index < num_consts + num_carry
            if carried and jaxpr.outvars[index - num_consts] != jaxpr.invars[index]:
                self.use(value, "carried and changed by a loop")
                inner.append(None)
            elif not views:
                inner.append(value)
            elif index < num_consts + num_carry:
                inner.append(_Value(tuple(map(enter_shared, views))))
            elif any(span.axis == 0 for view in views for span in view.spans):
                self.use(value, STACKED)
                inner.append(_Value())
            else:
                inner.append(_Value(tuple(map(enter_stacked, views))))
        length = equation.params["length"]
        context = dataclasses.replace(context, lengths=(*context.lengths, length))
        results = self.walk(jaxpr, inner, context)
        outer: _Values = []
        for index, (value, var) in enumerate(
            zip(results, equation.outvars, strict=True)
        ):
            if value is None or not value.views or primitives.is_dropped(var):
                outer.append(value)
                continue
            carried = index < num_carry
            if any(carried != (view.loops[-1] is None) for view in value.views):
                kept = "its last slice carried out of" if carried else "stacked by"
                self.use(value, f"{kept} a loop")
                outer.append(_Value())
                continue
            outer.append(_Value(tuple(map(leave, value.views))))
        return outer

    def cond(
        self,
        equation: primitives.Equation,
        bodies: tuple[primitives.Body, ...],
        operands: _Values,
        context: _Context,
    ) -> _Values:
        """Branches: a result is a leaf only where all branches agree."""
        context = dataclasses.replace(context, conditional=True)
        platforms = primitives.branch_platforms(equation)
        branches: list[_Values] = []
        # Of platforms, the present one's has the leaf's first use.
        for branch in primitives.branch_order(equation):
            inner = context.at(branch)
            if platforms is not None:
                inner = dataclasses.replace(inner, platforms=platforms[branch])
            branches.append(self.walk(bodies[branch].jaxpr, operands[1:], inner))
        results: _Values = []
        for values in zip(*branches, strict=True):
            first = values[0]
            if first and first.views and all(value == first for value in values):
                results.append(first)
                continue
            for value in values:
                self.use(value, "chosen by a branch")
            data = any(value is None for value in (operands[0], *values))
            results.append(None if data else _Value())
        return results
