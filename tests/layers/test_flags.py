"""Flags of JAX under which known calls take another form: the same layers are found.

To run all tests of the layers so: `JAX_REMAT3=1 python -m pytest tests/layers`, and
likewise `JAX_CUSTOM_VJP3` and `JAX_CUSTOM_JVP3`.
"""

import dataclasses
import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsbp_jax import explain, spectral_backprop
from dsbp_jax.layers import capture_activations, primitives
from dsbp_jax.layers.finder import trace
from tests.layers.models import CLOSURES, doubled, normal, rounded
from tests.layers.traces import equation_of

X = normal(5, 4)
SQUARES = {name: normal(4, 4, seed=i) / 2 for i, name in enumerate("abc")}
STACKED = {"a": normal(3, 4, 4) / 2, "b": normal(4, 4, seed=1), "c": normal(4, 4)}


def flag(name):
    """A flag, skipped where the installed JAX has none of this name."""
    missing = not hasattr(jax.config, name)
    reason = f"jax {jax.__version__} has no flag {name}"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


# The same layers are found under these ...
FOLLOWED = [*map(flag, ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3"))]
# ... and at least the calls that are not followed are named under this.
NAMED = [*FOLLOWED, flag("jax_scan3")]


@pytest.fixture
def switch():
    """Sets flags, and sets them back."""
    names = [param.values[0] for param in NAMED]
    before = {name: getattr(jax.config, name) for name in names if has(name)}
    for name in before:
        jax.config.update(name, False)
    yield jax.config.update
    for name, value in before.items():
        jax.config.update(name, value)


def has(name):
    return hasattr(jax.config, name)


def remat_layer(p, x):
    block = jax.checkpoint(lambda x, ab: jnp.tanh(x @ ab[0]) @ ab[1])
    return block(x, (p["a"], p["b"])) @ p["c"]


def remat_by_name(p, x):
    """What is saved is a layer's answer, and a kernel has a name too."""

    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("mid")
    )
    def block(x, p):
        h = checkpoint_name(x @ checkpoint_name(p["a"], "kernel"), "mid")
        return jnp.sin(h) @ p["b"]

    return block(x, p) @ p["c"]


def rules(p, x):
    return doubled(rounded(x, p["a"]), p["b"]) @ p["c"]


def activations(p, x):
    return jax.nn.relu6(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


def holding_data(p, x):
    return CLOSURES["custom_vjp"](p["a"]) @ p["b"] + CLOSURES["custom_jvp"](p["c"])


def in_a_scan(p, x):
    @jax.checkpoint
    def step(h, w):
        return jax.nn.relu(doubled(h, w) + rounded(h, p["b"])), None

    return lax.scan(step, x, p["a"])[0] @ p["c"]


def in_a_branch(p, x):
    taken = jax.checkpoint(lambda x: jax.nn.relu(x @ p["a"]))
    return lax.cond(x[0, 0] > 0, taken, lambda x: rounded(x, p["b"]), x) @ p["c"]


def nested_remat(p, x):
    inner = jax.checkpoint(lambda x: jax.nn.relu(x @ p["a"]))
    return jax.checkpoint(lambda x: jax.jit(inner)(x) @ p["b"])(x) @ p["c"]


MODELS = {
    remat_layer: SQUARES,
    remat_by_name: SQUARES,
    rules: SQUARES,
    activations: SQUARES,
    holding_data: SQUARES,
    in_a_scan: STACKED,
    in_a_branch: SQUARES,
    nested_remat: SQUARES,
}
models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)


def found(model):
    """What a trace finds, but for where it is."""
    traced = trace(model, MODELS[model], (X,), {})
    sites = [dataclasses.replace(site, key=()) for site in traced.sites]
    return sites, traced.uses


@pytest.mark.parametrize("name", FOLLOWED)
@models
def test_the_same_layers_are_found(switch, name, model):
    without, params = found(model), MODELS[model]
    table = str(explain(model, params, X))
    switch(name, True)
    assert found(model) == without
    assert str(explain(model, params, X)) == table
    assert {site.name for site in without[0]} == set("abc")


@pytest.mark.parametrize("name", FOLLOWED)
@models
def test_gradients_stay_what_they_are(switch, name, model):
    params = MODELS[model]
    loss = lambda p, x: jnp.sum(model(p, x) ** 2)
    captured = lambda p, x: capture_activations(loss)(p, x)
    wanted = jax.jit(jax.grad(loss))(params, X)
    (_, seen) = jax.jit(captured)(params, X)
    switch(name, True)
    grads, again = jax.jit(jax.grad(captured, has_aux=True))(params, X)
    jax.tree.map(close, (grads, again), (wanted, seen))


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("model", [remat_by_name, in_a_scan])
def test_sketched_gradients_stay_what_they_are(switch, name, model):
    params = MODELS[model]
    backprop = spectral_backprop(lambda p, x: jnp.sum(model(p, x) ** 2), rank=2)

    def gradients():
        state = backprop.init(params, X, key=jax.random.key(0))
        return jax.jit(backprop.value_and_grad)(params, state, X)[:2]

    wanted = gradients()
    switch(name, True)
    jax.tree.map(close, gradients(), wanted)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def vmapped(p, x):
    """Of rules under `vmap` JAX 0.10 makes a call that is not followed."""
    return jax.vmap(lambda x: rounded(x[None], p["a"])[0] @ p["b"])(x) @ p["c"]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("model", [*MODELS, vmapped], ids=lambda model: model.__name__)
def test_what_is_not_followed_is_named(switch, name, model):
    params = MODELS.get(model, SQUARES)
    without = explain(model, params, X)
    switch(name, True)
    table = explain(model, params, X)
    for leaf, report in without.items():
        named = "which is not followed" in table[leaf].reason
        assert table[leaf] == report or (named and "enters" in table[leaf].reason)
    assert table["c"] == without["c"]


@pytest.mark.skipif(not has("jax_scan3"), reason="no flag jax_scan3")
def test_loops_without_results_are_named(switch):
    switch("jax_scan3", True)
    table = explain(in_a_scan, STACKED, X)
    for leaf in "ab":
        assert "enters Scan3, which is not followed" in table[leaf].reason


def test_names_are_those_without_the_flags(switch):
    names = {"remat2", "custom_vjp_call", "name"}

    def inside():
        jaxpr = jax.make_jaxpr(lambda p: (remat_by_name(p, X), rules(p, X)))(SQUARES)
        return {primitives.name_of(e) for e in primitives.equations(jaxpr.jaxpr)}

    assert names <= inside()
    for name in filter(has, ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3")):
        switch(name, True)
    assert names <= inside()


def test_objects_of_the_user_are_no_calls_of_jax():
    """Classes of these names outside of JAX may do anything."""
    equation = equation_of(jnp.sin, X)
    for module, name in (("jax._src.hijax", "remat2"), ("user", "RematTraced")):
        held = type("RematTraced", (), {"__module__": module, "params": {"mine": 3}})()
        called = jex.Primitive("call_hi_primitive")
        high = equation.replace(primitive=called, params={"_prim": held})
        assert primitives.name_of(high) == name
        assert primitives.params_of(high) == {"mine": 3}
        assert primitives.call_of(high) is None
