"""Everything here that depends on the version of JAX.

The names and parameters of JAX's primitives are no public interface and move
between releases. The rest of the package asks this module which jaxprs an
equation runs, which operations only rearrange an array, and how to run one
equation as it stands. Supported from jax 0.10 on.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from dsbp_jax.layers import bodies

Equation = jex.JaxprEqn
Jaxpr = jex.Jaxpr
Var = jex.Var

DENSE = "dot_general"
CONVOLUTION = "conv_general_dilated"

# Operations whose result holds their operands side by side.
JOINS = frozenset({"concatenate", "stack"})

# Operations whose i-th result is their i-th operand, axis by axis.
AXISWISE = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "layout_constraint",
        "mesh_cast",
        "name",
        "optimization_barrier",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)

# Operations through which no derivative flows; what gives integers is not listed.
_STOPS = frozenset({"ceil", "floor", "round", "sign", "stop_gradient"})

_CALLS = {
    "call": "call",
    "closed_call": "call",
    "core_call": "call",
    "core_closed_call": "call",
    "eval_jaxpr": "call",  # the later name of closed_call
    "jit": "call",
    "pjit": "call",
    "checkpoint": "remat",
    "remat": "remat",
    "remat2": "remat",
    "custom_jvp_call": "rule",
    "custom_vjp_call": "rule",
    "custom_vjp_call_jaxpr": "rule",
    "scan": "scan",
    "cond": "cond",
}

# Under the flags `jax_remat3`, `jax_custom_vjp3` and `jax_custom_jvp3` one primitive
# stands for all of these, with an object that says which. They are called here what
# they are without the flag.
_HIGH = "call_hi_primitive"
_OBJECTS = {
    "CheckpointName": "name",
    "CheckpointNameFwd": "name",
    "CustomJVPTraced": "custom_jvp_call",
    "CustomVJPTraced": "custom_vjp_call",
    "RematTraced": "remat2",
}


@dataclasses.dataclass(frozen=True)
class Body:
    """One jaxpr that an equation runs.

    Attributes:
      jaxpr: Its equations.
      consts: Values of its constant inputs.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """An equation that runs other jaxprs on its operands.

    Attributes:
      kind: `"call"` (runs its body once), `"remat"`, `"rule"` (a body with a
        derivative rule of the user's), `"scan"` or `"cond"`.
      bodies: The branches of a `"cond"`, else one jaxpr.
    """

    kind: str
    bodies: tuple[Body, ...]


def name_of(equation: Equation) -> str:
    """What an equation does: its primitive, or the object that it calls."""
    name = equation.primitive.name
    if name != _HIGH:
        return name
    kind = type(equation.params["_prim"])
    ours = kind.__module__.startswith("jax.")
    return _OBJECTS.get(kind.__name__, kind.__name__) if ours else kind.__name__


def params_of(equation: Equation) -> dict[str, Any]:
    """The parameters of what `name_of` says."""
    if equation.primitive.name != _HIGH:
        return equation.params
    return getattr(equation.params["_prim"], "params", {})


def call_of(equation: Equation) -> Call | None:
    """What `equation` runs, or None where it is no call that can be entered."""
    kind = _CALLS.get(name_of(equation))
    params = params_of(equation)
    if kind is None or (kind == "remat" and params.get("differentiated")):
        # A rematerialisation that was already differentiated carries barriers
        # that `jax.checkpoint` would not put back.
        return None
    if kind == "cond":
        inner = tuple(params["branches"])
    else:
        names = ("fun_jaxpr", "call_jaxpr", "jaxpr", "traced")
        inner = tuple(params[name] for name in names if name in params)[:1]
    operands = len(equation.invars) - (kind == "cond")
    found = []
    for value in inner:
        jaxpr = bodies.plain(value)
        if jaxpr is None or len(jaxpr.invars) != operands:
            return None
        found.append(Body(jaxpr, bodies.constants(value)))
    return Call(kind, tuple(found)) if found else None


def brings_data(equation: Equation) -> bool:
    """Whether the results of what cannot be entered depend on more than its operands.

    A body may close over constants, a function over anything, and into a reference
    data are written later.
    """
    if name_of(equation) in AXISWISE:
        return False
    return (
        any(map(is_ref, equation.outvars))
        or bodies.has_constants(equation)
        or bodies.holds_functions(equation)
    )


def runs_code(equation: Equation) -> bool:
    """Whether an equation runs more than its own operation, by all that can be seen."""
    held = any(True for _ in bodies.inner_jaxprs(equation))
    return held or bodies.holds_functions(equation)


def equations(jaxpr: Jaxpr) -> Iterator[Equation]:
    """The equations of a jaxpr and of all that they run, however deep."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in bodies.inner_jaxprs(equation):
            yield from equations(inner)


def scan_sizes(equation: Equation) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since jax 0.11
    return len(consts), len(carry)


def scan_options(equation: Equation) -> dict[str, Any]:
    """The keyword arguments of `jax.lax.scan` that `equation` was made with."""
    names = ("length", "reverse", "unroll", "_split_transpose")
    return {name: equation.params[name] for name in names if name in equation.params}


def remat_options(equation: Equation) -> dict[str, Any]:
    """The keyword arguments of `jax.checkpoint` for `equation`.

    Its function is to be called with a list of the operands and one more argument.
    """
    names, params = ("prevent_cse", "policy"), params_of(equation)
    options = {name: params[name] for name in names if name in params}
    if isinstance(prevent_cse := options.get("prevent_cse"), tuple):
        options["prevent_cse"] = (list(prevent_cse), True)
    return options


def branch_platforms(equation: Equation) -> list[tuple[str, ...]] | None:
    """For each branch of `jax.lax.platform_dependent` its platforms.

    Args:
      equation: A cond.

    Returns:
      No platform for the default branch, which comes last; None where data choose.
    """
    platforms = equation.params.get("branches_platforms")
    return None if platforms is None else [tuple(names or ()) for names in platforms]


def branch_order(equation: Equation) -> list[int]:
    """The branches of a cond, that of JAX's default backend first, if there is one."""
    platforms = branch_platforms(equation)
    if platforms is None:
        return list(range(len(equation.params["branches"])))
    backend = jax.default_backend()
    here = {"cuda", "rocm"} if backend == "gpu" else {backend}
    named = [bool(here.intersection(names)) for names in platforms]
    # The default is taken where no branch names the backend.
    taken = named if any(named) else [not names for names in platforms]
    return sorted(range(len(platforms)), key=lambda branch: not taken[branch])


def switch(equation: Equation, branches: Sequence[Any], operands: Sequence[Any]) -> Any:
    """Runs a cond with other branches.

    Args:
      equation: The cond.
      branches: One function of a list of operands for each of its own.
      operands: The index, and what the branches get.

    Returns:
      What the branch that is taken returns. Branches of other platforms are not
      lowered where the cond's own would not be.
    """
    platforms, (index, *operands) = branch_platforms(equation), operands
    if platforms is None:
        return jax.lax.switch(index, branches, operands)
    named = {
        name: branch
        for names, branch in zip(platforms, branches, strict=True)
        for name in names
    }
    default = None if platforms[-1] else branches[-1]
    return jax.lax.platform_dependent(operands, default=default, **named)


def constrain(equation: Equation, which: str, values: Sequence[Any]) -> list[Any]:
    """Values with the shardings that a jit asks for of its operands or results.

    Args:
      equation: Any call.
      which: `"in_shardings"` or `"out_shardings"`.
      values: Its operands or results.

    Returns:
      The values.
    """
    asked = equation.params.get(which) or [None] * len(values)
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding)
        else value
        for value, sharding in zip(values, asked, strict=True)
    ]


def context(equation: Equation) -> contextlib.AbstractContextManager[None]:
    """Where `equation` was traced (mesh, metadata, device), to bind others there."""
    return equation.ctx.manager


def is_literal(atom: Any) -> bool:
    """Whether an operand is a constant written into the equation."""
    return isinstance(atom, jex.Literal)


def aval(atom: Any) -> jax.core.ShapedArray:
    """The shape and dtype of an operand or a result."""
    return atom.aval


def is_inexact(atom: Any) -> bool:
    """Whether an operand or a result is of a type that has derivatives."""
    dtype = getattr(aval(atom), "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_ref(atom: Any) -> bool:
    """Whether an operand is a reference to a mutable array."""
    return hasattr(aval(atom), "inner_aval")


def stops_gradient(equation: Equation) -> bool:
    """Whether the derivative of an operation is zero, whatever its operands."""
    return equation.primitive.name in _STOPS


def is_dropped(var: Any) -> bool:
    """Whether a result is used nowhere."""
    return isinstance(var, jex.DropVar)


def is_unused(equation: Equation) -> bool:
    """Whether an equation does nothing: no result, no effect, nothing to write into."""
    acts = bool(equation.effects) or any(map(is_ref, equation.invars))
    return not acts and all(map(is_dropped, equation.outvars))


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Runs one equation as it stands, on other operands of the same types.

    Args:
      equation: The equation. All its parameters are kept, and so are the
        context (mesh, metadata) and the source it was traced with.
      values: One value per operand, literals included.

    Returns:
      The results, always as a list.
    """
    atoms = zip(equation.invars, values, strict=True)
    variables = {
        atom: value for atom, value in atoms if not isinstance(atom, jex.Literal)
    }
    jaxpr = Jaxpr(
        constvars=[],
        invars=list(variables),
        outvars=list(equation.outvars),
        eqns=[equation],
        effects=equation.effects,
        debug_info=_DEBUG_INFO,
    )
    return jax.core.eval_jaxpr(jaxpr, [], *variables.values())


def zeros(struct: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of a type that tracing found, its sharding and varying axes too."""
    sharding = getattr(struct, "sharding", None)
    explicit = sharding is not None and any(
        kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types
    )
    result = jnp.zeros(
        struct.shape, struct.dtype, device=sharding if explicit else None
    )
    varying = getattr(getattr(struct, "manual_axis_type", None), "varying", None)
    if varying:
        result = jax.lax.pcast(result, tuple(varying), to="varying")
    return result


def explicit_sharding(array: jax.Array) -> jax.sharding.NamedSharding | None:
    """The sharding that is part of an array's type, on meshes with such axes."""
    sharding = jax.typeof(array).sharding
    kinds = sharding.mesh.axis_types
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in kinds)
    return sharding if explicit else None


_DEBUG_INFO = jex.DebugInfo("dsbp_jax", "dsbp_jax", None, None)
