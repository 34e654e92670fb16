"""What JAX's equations say, and that they keep it where they are bound anew."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsbp_jax import explain, spectral_backprop
from dsbp_jax.layers import bodies, capture_activations, primitives
from dsbp_jax.layers.finder import trace
from tests.layers.models import normal
from tests.layers.traces import equation_of

X = normal(5, 4)
SQUARES = {name: normal(4, 4, seed=i) / 2 for i, name in enumerate("abc")}


def equations(fn, *args, primitive):
    """The equations of one primitive that a function runs, however deep."""
    found = primitives.equations(jax.make_jaxpr(fn)(*args).jaxpr)
    return [e for e in found if primitives.name_of(e) == primitive]


def captured(model):
    return lambda *args: capture_activations(model)(*args)[0]


# Single equations


def test_an_equation_runs_on_other_operands():
    high = lambda x, w: lax.dot(x, w, precision="highest")
    equation = equation_of(high, X, SQUARES["a"])
    other, w = X + 1, SQUARES["b"]
    (result,) = primitives.bind(equation, (other, w))
    np.testing.assert_allclose(result, other @ w, rtol=1e-5)
    again = equation_of(lambda x, w: primitives.bind(equation, (x, w)), X, w)
    assert again.params == equation.params
    (result,) = primitives.bind(equation_of(lambda x: x * 2.0, X), (other, 2.0))
    np.testing.assert_array_equal(result, 2 * other)
    halves = equation_of(lambda x: lax.split(x, (1, 3), axis=1), X)
    first, second = primitives.bind(halves, (other,))
    np.testing.assert_array_equal(first, other[:, :1])
    np.testing.assert_array_equal(second, other[:, 1:])


rule = jax.custom_jvp(jnp.sin)
rule.defjvp(lambda primals, tangents: (rule(*primals), tangents[0]))

KINDS = {
    "call": (jax.jit(jnp.sin), 1),
    "remat": (jax.checkpoint(jnp.sin), 1),
    "rule": (rule, 1),
    "scan": (lambda x: lax.scan(lambda c, x: (c, x), 0.0, x)[1], 1),
    "cond": (lambda x: lax.switch(jnp.int32(1), [jnp.sin, jnp.cos, jnp.tanh], x), 3),
    None: (lambda x: lax.while_loop(lambda x: x[0, 0] < 0, jnp.exp, x), 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_kind_of_call_an_equation_is(kind):
    fn, number = KINDS[kind]
    *_, equation = jax.make_jaxpr(fn)(X).jaxpr.eqns
    call = primitives.call_of(equation)
    assert (call and call.kind) == kind
    if call is None:  # its jaxprs are seen all the same
        assert len(list(bodies.inner_jaxprs(equation))) == 2
        return
    assert len(call.bodies) == number
    inner = list(bodies.inner_jaxprs(equation))
    assert [body.jaxpr for body in call.bodies] == inner[:number]


def test_equations_are_found_however_deep():
    once = jax.jit(lambda x: jnp.sin(x))
    step = lambda x, _: (jax.checkpoint(once)(x), None)
    deep = lambda x: once(lax.scan(step, x, length=2)[0])
    assert len(equations(deep, X, primitive="sin")) == 2
    assert len(equations(deep, X, primitive="scan")) == 1


@pytest.mark.parametrize("consts", [0, 2])
def test_operands_of_a_scan(consts):
    held = [normal(4, seed=i) for i in range(consts)]

    def model(x, *held):
        step = lambda c, x: ((sum(held, c[0] + x), 2.0 * c[1], c[2] * x), x)
        return lax.scan(step, (jnp.zeros(4), 0.0, x[0]), x)

    (scan,) = equations(model, X, *held, primitive="scan")
    assert primitives.scan_sizes(scan) == (consts, 3)


def test_the_platform_in_use_comes_first():
    chosen = lambda x: lax.switch(jnp.int32(1), [jnp.sin, jnp.cos], x)
    (by_data,) = equations(chosen, X, primitive="cond")
    assert primitives.branch_platforms(by_data) is None
    assert primitives.branch_order(by_data) == [0, 1]
    by_name = lambda **named: equations(
        lambda x: lax.platform_dependent(x, default=jnp.tanh, **named),
        X,
        primitive="cond",
    )[0]
    here = by_name(tpu=jnp.sin, cpu=jnp.cos)
    assert primitives.branch_platforms(here) == [("tpu",), ("cpu",), ()]
    assert primitives.branch_order(here) == [1, 0, 2]
    assert primitives.branch_order(by_name(tpu=jnp.sin, cuda=jnp.cos)) == [2, 0, 1]


def test_what_has_a_derivative():
    assert primitives.stops_gradient(equation_of(jnp.sign, X))
    assert not primitives.stops_gradient(equation_of(jnp.sin, X))
    jaxpr = jax.make_jaxpr(lambda x, i: (x, i, 1.0))(X, jnp.int32(0)).jaxpr
    assert [primitives.is_inexact(v) for v in jaxpr.outvars] == [True, False, True]
    assert [primitives.is_literal(v) for v in jaxpr.outvars] == [False, False, True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_zeros_of_a_type(dtype):
    zeros = primitives.zeros(jax.ShapeDtypeStruct((2, 3), dtype))
    assert zeros.dtype == dtype
    np.testing.assert_array_equal(zeros, np.zeros((2, 3)))
    assert primitives.explicit_sharding(zeros) is None


# Branches by platform. `alien` has no lowering: whoever lowers it fails.

alien_p = jex.Primitive("alien")
alien_p.def_abstract_eval(lambda x, w: x.update(shape=(x.shape[0], w.shape[1])))


def alien(x, w):
    return alien_p.bind(x, w)


def by_platform(x, w):
    return lax.platform_dependent(x, w, tpu=alien, cpu=jnp.matmul, default=alien)


def alien_default(p, x):
    return jnp.tanh(by_platform(x, p["a"])) @ p["b"]


def default_here(p, x):
    only_elsewhere = lambda x, w: jnp.sin(x @ w) + alien(x, w)
    h = lax.platform_dependent(x, p["a"], tpu=only_elsewhere, default=jnp.matmul)
    return h @ p["b"]


def in_a_scan(p, x):
    stack = jnp.stack([p["a"], p["b"]]) if "stack" not in p else p["stack"]
    return lax.scan(lambda h, w: (jnp.tanh(by_platform(h, w)), None), x, stack)[0]


def shared_by_platforms(p, x):
    h = lax.platform_dependent(x, p["a"], tpu=alien, cuda=alien, cpu=jnp.matmul)
    return h @ p["b"]


def in_remat(p, x):
    return jax.checkpoint(alien_default)(p, x)


PLATFORMS = [alien_default, default_here, shared_by_platforms, in_remat]


@pytest.mark.parametrize("model", PLATFORMS)
def test_branches_of_other_platforms_are_not_lowered(model):
    wanted = jax.jit(model)(SQUARES, X)
    out, seen = jax.jit(capture_activations(model))(SQUARES, X)
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(seen["a"].inputs, X)
    assert seen["a"].count == seen["b"].count == 5
    np.testing.assert_allclose(capture_activations(model)(SQUARES, X)[0], wanted, 1e-5)
    kinds = lambda fn: [
        e.params.get("branches_platforms")
        for e in equations(fn, SQUARES, X, primitive="cond")
    ]
    assert kinds(captured(model)) == kinds(model)
    assert None not in kinds(model)


def test_branches_by_platform_in_a_loop():
    params = {"stack": normal(3, 4, 4)}
    wanted = jax.jit(in_a_scan)(params, X)
    out, seen = jax.jit(capture_activations(in_a_scan))(params, X)
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(seen["stack"].count, [5, 5, 5])
    np.testing.assert_array_equal(seen["stack"].inputs[0], X)


def test_gradients_through_branches_by_platform():
    def elsewhere(x, w):
        return jnp.exp(x @ w)

    def loss(p, x):
        h = lax.platform_dependent(x, p["a"], tpu=elsewhere, default=jnp.matmul)
        return jnp.sum(jnp.tanh(h) @ p["b"])

    wanted = jax.grad(loss)(SQUARES, X)
    got = jax.jit(jax.grad(captured(loss)))(SQUARES, X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, wanted)


def test_the_first_use_is_that_of_the_platform_in_use():
    found = trace(default_here, SQUARES, (X,), {})
    platforms = {site.name: site.platforms for site in found.sites}
    assert platforms == {"a": (), "a#1": ("tpu",), "b": ()}
    _, seen = capture_activations(default_here)(SQUARES, X)
    assert {name: int(layer.count) for name, layer in seen.items()} == {
        "a": 5,
        "a#1": 0,
        "b": 5,
    }
    assert not np.any(seen["a#1"].inputs)
    table = explain(default_here, SQUARES, X)
    assert table["a#1"].use.endswith("in a branch for tpu")
    assert table["a"].use.endswith("in a branch")


def test_a_layer_of_another_platform_only():
    def loss(p, x):
        x = x @ p["a"]
        h = lax.platform_dependent(
            x, p["b"], tpu=jnp.matmul, cuda=jnp.matmul, default=lambda x, w: x
        )
        return jnp.sum(h**2)

    params, x = {"a": normal(16, 16), "b": normal(16, 16)}, normal(32, 16)
    _, seen = jax.jit(capture_activations(loss))(params, x)
    assert (seen["a"].count, seen["b"].count) == (32, 0)
    assert explain(loss, params, x)["b"].use.endswith("in a branch for tpu, cuda")
    backprop = spectral_backprop(loss, rank=2)
    state = backprop.init(params, x, key=jax.random.key(0))
    value, grads, _ = jax.jit(backprop.value_and_grad)(params, state, x)
    np.testing.assert_allclose(value, loss(params, x), rtol=1e-6)
    assert not np.any(grads["b"])


# What else a call was given


def test_loops_keep_their_options():
    def model(p, x):
        def body(h, w):
            return jnp.tanh(h @ w), jnp.sum(h)

        h, _ = lax.scan(body, x, p["stack"], reverse=True, unroll=2)
        return lax.scan(lambda h, _: (h @ p["a"], None), h, length=3)[0]

    params = SQUARES | {"stack": normal(4, 4, 4)}
    options = lambda fn: [
        primitives.scan_options(e) for e in equations(fn, params, X, primitive="scan")
    ]
    assert options(captured(model)) == options(model)
    assert options(model)[0]["unroll"] == 2


@pytest.mark.parametrize("prevent_cse", [True, False, (True, (False, True))])
def test_remat_keeps_its_options(prevent_cse):
    policy = jax.checkpoint_policies.dots_saveable
    block = jax.checkpoint(
        lambda x, ab: jnp.tanh(x @ ab[0]) @ ab[1],
        policy=policy,
        prevent_cse=prevent_cse,
    )
    model = lambda p, x: block(x, (p["a"], p["b"]))
    (plain,) = equations(model, SQUARES, X, primitive="remat2")
    (again,) = equations(captured(model), SQUARES, X, primitive="remat2")
    asked, kept = primitives.params_of(plain), primitives.params_of(again)
    assert kept["policy"] is policy
    assert kept.get("prevent_cse") == asked.get("prevent_cse")
    np.testing.assert_allclose(
        capture_activations(model)(SQUARES, X)[0], model(SQUARES, X), rtol=1e-6
    )


def test_inner_jits_keep_their_shardings():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("i"))
    columns = NamedSharding(mesh, PartitionSpec(None, "i"))
    product = jax.jit(jnp.matmul, in_shardings=(rows, columns), out_shardings=columns)
    model = lambda p, x: product(x, p["w"])
    params, x = {"w": normal(4, 8)}, normal(8, 4)
    asked = equations(captured(model), params, x, primitive="sharding_constraint")
    assert [e.params["sharding"].spec for e in asked] == [
        rows.spec,
        columns.spec,
        columns.spec,
    ]
    out, _ = jax.jit(capture_activations(model))(params, x)
    assert out.sharding.is_equivalent_to(columns, 2)
    np.testing.assert_allclose(out, x @ params["w"], rtol=1e-5, atol=1e-5)
    # Of a jit that says nothing, nothing is asked.
    quiet = lambda p, x: jax.jit(jnp.matmul)(x, p["w"])
    assert not equations(captured(quiet), params, x, primitive="sharding_constraint")


@pytest.mark.parametrize("primitive", ["scan", "cond", "remat2", "dot_general"])
def test_calls_keep_the_context_that_they_were_traced_in(primitive):
    def model(p, x):
        with set_xla_metadata(mark="kept"):
            x = lax.scan(lambda h, w: (h @ w, None), x, p["a"][None])[0]
            x = lax.cond(x[0, 0] > 0, lambda x: x @ p["b"], lambda x: x, x)
            return jax.checkpoint(lambda x: x @ p["c"])(x)

    marks = lambda fn: [
        e.ctx.xla_metadata for e in equations(fn, SQUARES, X, primitive=primitive)
    ]
    assert marks(captured(model)) == marks(model)
    assert all(mark == {"mark": "kept"} for mark in marks(model))
