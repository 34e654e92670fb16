"""Calls that other versions of JAX make, or nobody knows: what they hold is named."""

import dataclasses
import functools
import types

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax import explain
from dsbp_jax.layers import bodies, capture_activations, primitives
from dsbp_jax.layers.finder import trace
from tests.layers.models import normal
from tests.layers.traces import equation_of, find

X = normal(5, 4)
SQUARES = {name: normal(4, 4, seed=i) / 2 for i, name in enumerate("abc")}


@dataclasses.dataclass(frozen=True)
class Holder:
    body: object


class Bag:
    """No dataclass, no container, and it holds itself."""

    def __init__(self, body):
        self.inside, self.own = body, self


class Slots:
    __slots__ = "body"

    def __init__(self, body):
        self.body = body


class Called(Slots):
    __slots__ = ("__weakref__", "never_set")

    def __call__(self):
        return self.body


class Closed:
    """Its own attribute `jaxpr`, as JAX's traced functions have."""

    def __init__(self, body):
        self.jaxpr = body


class Method:
    def __init__(self, body):
        self.body = body

    def thunk(self):
        return self.body


def call_primitive(name, hold):
    """A call of one body under any name.

    Args:
      name: The primitive's.
      hold: From a closed jaxpr to the parameters that hold it, or the name of one.
    """
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    if isinstance(hold, str):
        key = hold
        hold = lambda closed: {key: closed}
    traced = {}  # the equation's operand shapes are enough to tell its body

    @primitive.def_impl
    def impl(*args, **params):
        closed = traced[tuple(arg.shape for arg in args)]
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *args)

    @primitive.def_abstract_eval
    def shapes(*avals, **params):
        return traced[tuple(aval.shape for aval in avals)].out_avals

    def call(fn, *args):
        closed = jax.make_jaxpr(fn)(*args)
        traced[tuple(arg.shape for arg in args)] = closed
        return primitive.bind(*args, **hold(closed))[0]

    return call


@pytest.mark.parametrize("name", ["closed_call", "eval_jaxpr"])
@pytest.mark.parametrize("key", ["call_jaxpr", "jaxpr"])
def test_closed_calls_are_followed_by_either_name(name, key):
    call = call_primitive(name, key)
    model = lambda p, x: call(jnp.matmul, x, p["a"]) @ p["b"]
    out, seen = capture_activations(model)(SQUARES, X)
    assert set(seen) == {"a", "b"}
    np.testing.assert_allclose(out, model(SQUARES, X), rtol=1e-6)
    np.testing.assert_array_equal(seen["a"].inputs, X)
    assert explain(model, SQUARES, X)["a"].use == "dense, 5 rows"


def test_the_closed_calls_of_this_version_are_followed():
    """A traced function is called by `eval_jaxpr` where JAX has it, or in place."""

    def model(p, x):
        product = jax.jit(lambda x, w: CONSTANT + x @ w)
        return product.trace(x, p["a"])(x, p["a"]) @ p["b"]

    sites, _ = find(model, SQUARES, X)
    assert set(sites) == {"a", "b"}
    out, _ = jax.jit(capture_activations(model))(SQUARES, X)
    np.testing.assert_allclose(out, model(SQUARES, X), rtol=1e-5)


CONSTANT = np.asarray(normal(5, 4, seed=3))

# How the parameters of an unknown call may hold its jaxpr in plain sight ... (Lists and
# dicts are inside of something else: what cannot be hashed is no parameter.)
SEEN = {
    "closed": lambda c: {"jaxpr": c},
    "jaxpr": lambda c: {"body": c.jaxpr},
    "tuple": lambda c: {"bodies": ((3, c), "one")},
    "jaxprs": lambda c: {"bodies": (c.jaxpr, c.jaxpr)},
    "list": lambda c: {"bag": Bag([c])},
    "dict": lambda c: {"bag": Bag({"then": [c], "else": None})},
    "mapping": lambda c: {"bag": Bag(types.MappingProxyType({"then": c}))},
    "set": lambda c: {"bodies": frozenset([Holder(c)])},
    "dataclass": lambda c: {"bodies": (Holder(c),)},
    "object": lambda c: {"bag": (Bag(Slots((1, c))),)},
    "attribute": lambda c: {"traced": Closed(Closed(c))},
}

# ... and how they may hide it.
HIDDEN = {
    "function": lambda c: {"thunk": lambda: c},
    "partial": lambda c: {"thunk": functools.partial(lambda c: c, c)},
    "method": lambda c: {"thunk": Method(c).thunk},
    "jitted": lambda c: {"thunk": jax.jit(lambda: c)},
    "callable": lambda c: {"thunk": Called(3)},
    "nested": lambda c: {"rules": (("forward", Bag([Slots(lambda: c)])),)},
    "wrapped": lambda c: {"bag": Bag(rule_of_jax())},
}


def rule_of_jax():
    """A function as `jax.custom_vjp` wraps it in its equation."""
    rule = jax.custom_vjp(lambda x: x)
    rule.defvjp(lambda x: (x, None), lambda _, g: (g,))
    return primitives.params_of(equation_of(rule, X))["bwd"]


@pytest.mark.parametrize("form", [*SEEN, *HIDDEN])
@pytest.mark.parametrize(
    "name", ["mystery", "jit"]
)  # no name, and one in no known form
def test_calls_that_are_not_understood_are_named(name, form):
    hold = {**SEEN, **HIDDEN}[form]
    if name == "jit":
        known = hold
        hold = lambda closed: {f"hidden_{k}": v for k, v in known(closed).items()}
    call = call_primitive(name, hold)
    joint = lambda p: jnp.concatenate([p["b"], p["c"]], 1)
    model = lambda p, x: call(jnp.matmul, x, p["a"]) @ call(lambda w: w, joint(p))
    table = explain(model, SQUARES, X)
    assert {report.view for report in table.values()} == {None}
    assert f"enters {name}, which is not followed" in table["a"].reason
    for leaf in "bc":
        assert f"then enters {name}, which is not followed" in table[leaf].reason


@pytest.mark.parametrize("form", SEEN)
def test_a_call_runs_as_it_stands_around_other_layers(form):
    call = call_primitive("mystery", SEEN[form])
    model = lambda p, x: call(jnp.matmul, x @ p["b"], p["a"]) @ p["c"]
    out, seen = capture_activations(model)(SQUARES, X)
    assert set(seen) == {"b", "c"}
    np.testing.assert_allclose(out, model(SQUARES, X), rtol=1e-6)


@pytest.mark.parametrize("form", [*SEEN, *HIDDEN])
def test_data_that_an_unknown_call_holds_are_data_after_it(form):
    """Of a function nobody knows what it holds."""
    call = call_primitive("mystery", {**SEEN, **HIDDEN}[form])
    holding = lambda p: call(lambda w: CONSTANT @ w, p["a"]) @ p["b"]
    without = lambda p: call(lambda w: w + 1.0, p["a"]) @ p["b"]
    for model, data in ((holding, True), (without, form in HIDDEN)):
        found = trace(model, SQUARES, (), {})
        assert [site.path for site in found.sites] == (["b"] if data else [])
        assert "enters mystery" in dict(found.uses)["a"]
        assert data or "parameters or constants only" in dict(found.uses)["b"]


def test_what_holds_no_code():
    equation = equation_of(lambda x: lax.with_sharding_constraint(x, on_a_mesh()), X)
    assert not bodies.holds_functions(equation)  # though a mesh can be called
    assert not list(bodies.inner_jaxprs(equation))
    key = lambda: jax.random.key(0)
    for drawn in jax.make_jaxpr(key)().jaxpr.eqns:
        assert not bodies.holds_functions(drawn)


def on_a_mesh():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


# What an equation does without giving a result


def no_results(p, x):
    """A call that gives nothing, of nobody knows which effect."""
    jax.debug.callback(lambda w: None, p["a"])
    return x @ p["b"]


def test_a_leaf_that_enters_an_equation_without_results_is_named():
    table = explain(no_results, SQUARES, X)
    assert "enters debug_callback, which is not followed" in table["a"].reason
    assert "also" not in explain(no_results, SQUARES, X)["b"].reason


def through_a_reference(p, x):
    ref = jax.new_ref(jnp.zeros((5, 4)))
    ref[...] = jnp.tanh(x @ p["a"])
    return ref[...] @ p["b"]


def test_what_is_read_from_a_reference_is_data():
    sites, uses = find(through_a_reference, SQUARES, X)
    assert set(sites) == {"a", "b"}
    assert not uses
    out, seen = jax.jit(capture_activations(through_a_reference))(SQUARES, X)
    np.testing.assert_allclose(out, through_a_reference(SQUARES, X), rtol=1e-5)
    np.testing.assert_allclose(seen["b"].inputs, jnp.tanh(X @ SQUARES["a"]), rtol=1e-5)


def test_leaves_that_are_written_into_a_reference_are_named():
    def model(p, x):
        ref, other = jax.new_ref(p["a"]), jax.new_ref(jnp.zeros((4, 4)))
        other[...] = p["b"]
        return x @ ref[...] @ other[...] @ p["c"]

    sites, uses = find(model, SQUARES, X)
    assert set(sites) == {"c"}
    assert uses == {"a": "used by new_ref", "b": "used by swap"}
