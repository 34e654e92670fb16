"""Which answers a gradient flows back to, and which meet each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dsbp_jax
from dsbp_jax.layers import dataflow
from dsbp_jax.layers.finder import trace
from tests.layers.models import normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

stop = lax.stop_gradient
PARAMS = {
    "a": normal(4, 6),
    "b": normal(6, 3, seed=1),
    "s": normal(4, 4, seed=2),
    "stack": normal(3, 4, 4, seed=3),
}
X, Y = normal(5, 4, seed=4), normal(7, 4, seed=5)


def f(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def sites(model, *args, params=PARAMS):
    """Name to whether the use has a gradient, and its rows, in the trace's order."""
    found = trace(model, params, args, {}).sites
    return {s.name: (s.has_gradient, s.inputs.num_rows) for s in found}


def looped(p, x, y):
    """A target that a loop computes, and a pass in a loop."""
    step = lambda h, w: (jnp.tanh(h @ w), None)
    goal = stop(lax.scan(step, y, p["stack"])[0])
    return jnp.sum(lax.scan(step, x, p["stack"])[0]) + jnp.sum(goal)


def inside_calls(p, x, y):
    run = jax.jit(jax.checkpoint(f))
    goal = lax.cond(y[0, 0] > 0, lambda y: run(p, y), lambda y: -run(p, y), y)
    return jnp.sum(run(p, x)) + jnp.sum(stop(goal))


TARGETS = {
    "of stopped params": lambda p, x, y: (
        jnp.sum(f(stop(p), y)) + jnp.sum(f(p, x)),
        {"a": 5, "b": 5},
    ),
    "with a stopped answer": lambda p, x, y: (
        jnp.sum(stop(f(p, y))) + jnp.sum(f(p, x)),
        {"a": 5, "b": 5},
    ),
    "pseudo labels": lambda p, x, y: (
        jnp.sum(jax.nn.one_hot(jnp.argmax(f(p, y), -1), 3)) + jnp.sum(f(p, x)),
        {"a": 5, "b": 5},
    ),
    "in a loop": lambda p, x, y: (looped(p, x, y), {"stack": 5}),
    "in calls": lambda p, x, y: (inside_calls(p, x, y), {"a": 5, "b": 5}),
    "rounded": lambda p, x, y: (
        jnp.sum(jnp.round(f(p, y))) + jnp.sum(f(p, x)),
        {"a": 5, "b": 5},
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_pass_that_carries_gradient_is_the_layer(name):
    model = lambda p, x, y: TARGETS[name](p, x, y)[0]
    _, rows = TARGETS[name](PARAMS, X, Y)
    found = sites(model, X, Y)
    assert list(found)[: len(rows)] == list(rows)
    for path, number in rows.items():
        assert found[path] == (True, number)
        others = [found[use] for use in found if use.startswith(f"{path}#")]
        assert others
        assert not any(gradient for gradient, _ in others)
        assert {number for _, number in others} == {7}
    # And truly: those that are said to carry none add nothing to the gradient.
    gradients = jax.grad(model)(PARAMS, X, Y)
    alone = jax.grad(model)(PARAMS, X, Y + 1)
    jax.tree.map(np.testing.assert_array_equal, gradients, alone)
    report = dsbp_jax.explain(model, PARAMS, X, Y, rank=1)
    for path in rows:
        assert "no gradient" not in report[path].reason
        assert "no gradient: " in report[f"{path}#1"].reason
        assert report[f"{path}#1"].no_sketch == "no gradient"


def test_both_networks_of_a_pair_learn():
    """Each predicts the other's stopped answer (SimSiam): all four are layers."""

    def loss(p, x, y):
        first, second = f(p, x), f(p, y)
        pairs = ((first, second), (second, first))
        dots = [jnp.sum((a @ p["c"]) * stop(b).mean(0)[None]) for a, b in pairs]
        return sum(dots)

    found = sites(loss, X, Y, params={**PARAMS, "c": normal(3, 3)})
    assert len(found) == 6
    assert all(gradient for gradient, _ in found.values())
    assert found["a"] == (True, 5)


def test_rules_of_the_user_may_pass_what_their_body_stops():
    passing = jax.custom_vjp(lambda x, w: stop(x @ w))
    passing.defvjp(
        lambda x, w: (passing(x, w), (x, w)),
        lambda res, g: (g @ res[1].T, res[0].T @ g),
    )
    found = sites(lambda p, x: passing(jnp.tanh(x @ p["a"]), p["b"]), X)
    assert found == {"a": (True, 5), "b": (True, 5)}


def test_carries_of_a_loop_carry_gradient_from_one_to_the_other():
    """Each iteration hands its answer to the next under another name."""

    def model(p, x):
        step = lambda c, _: ((c[0] @ p["s"], c[0], c[1]), None)
        return lax.scan(step, (x, x, x), length=4)[0][2]

    assert sites(model, X) == {"s": (True, 5)}
    stopped = lambda p, x: stop(model(p, x)) + x
    assert sites(stopped, X) == {"s": (False, 5)}


# The passes themselves


def test_origins_tell_free_from_stopped():
    def model(p, x):
        h = x @ p["a"]
        return (stop(h) @ p["b"]) @ p["b"].T @ p["a"].T

    traced = trace(model, PARAMS, (X,), {})
    keys = [site.key for site in traced.sites]
    ordered = sorted(traced.sites, key=lambda site: site.key)
    met = dataflow.meetings(traced.body, ordered, keys)
    origins = [met[site.key] for site in ordered]
    assert origins == [(0, 0), (0, 0b001), (0b010, 0b001), (0b110, 0b001)]
    assert dataflow.carrying(traced.body, ordered) == {s.key for s in ordered[1:]}
