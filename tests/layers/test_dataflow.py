"""Which use of a leaf is the layer: by gradient first, then by program order."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dsbp_jax
from dsbp_jax import MatrixView
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


def segments(p, x):
    first = jnp.tanh(x @ p["s"])
    return first + jnp.tanh(stop(first) @ p["s"])


LAYERS = {
    "plain": (f, ("a", "b")),
    "probe": (lambda p, x: stop(jnp.tanh(x @ p["a"])) @ p["b"], ("a", "b")),
    "truncated": (
        segments,
        ("s", "s#1"),
    ),
    "truncated, one row": (
        lambda p, x: jnp.tanh(stop(jnp.tanh(x[:1] @ p["s"])) @ p["s"]),
        ("s", "s#1"),
    ),
    "truncated loop": (
        lambda p, x: lax.scan(
            lambda h, _: (jnp.tanh(stop(h) @ p["s"]),) * 2, x[:1], length=3
        )[1],
        ("s",),
    ),
    "tied, one row": (
        lambda p, x: jnp.tanh(x[:1] @ p["a"]) @ p["a"].T,
        ("a", "a#1"),
    ),
    "tied to stopped features": (
        lambda p, x: stop(jnp.tanh(x @ p["a"])) @ p["a"].T,
        ("a", "a#1"),
    ),
    "scaled by its norm": (
        lambda p, x: x[:1] @ (p["a"] / jnp.sum(p["a"])) + x[:1] @ p["a"],
        ("a",),
    ),
    "straight through": (
        lambda p, x: (h := x @ p["a"]) + stop(jnp.round(h) - h) @ p["b"] @ p["b"].T,
        ("a", "b", "b#1"),
    ),
    "predictions": (lambda p, x: jnp.argmax(f(p, x), -1), ("a", "b")),
    "returned by a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["s"]), x),
        ("s",),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_stays_a_layer(name):
    model, names = LAYERS[name]
    assert tuple(sites(model, X)) == names


def test_plain_functions_keep_program_order():
    model = lambda p, x: f(p, x) @ p["b"].T @ p["a"].T
    assert list(sites(model, X)) == ["a", "b", "b#1", "a#1"]
    assert all(gradient for gradient, _ in sites(model, X).values())


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


# Power iterations


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(9, name="sn"))(x, update_stats=True)
        return nn.Dense(1)(nn.tanh(x))


def linen():
    x, model = normal(5, 4), Critic()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def forward(params, rest, x):
        return model.apply({"params": params, **rest}, x, mutable=["batch_stats"])

    rest = {"batch_stats": variables["batch_stats"]}
    return forward, variables["params"], (rest, x), "sn/kernel", "Dense_0/kernel"


def haiku():
    def net(x):
        w = hk.get_parameter("w", (4, 9), init=hk.initializers.RandomNormal())
        return hk.Linear(1)(jnp.tanh(x @ hk.SpectralNorm(n_steps=3)(w)))

    model, x = hk.without_apply_rng(hk.transform_with_state(net)), normal(5, 4)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, params, (state, x), "~/w", "linear/w"


def equinox(inference=False):
    def build(key):
        layer = eqx.nn.SpectralNorm(
            eqx.nn.Linear(4, 9, key=key), "weight", inference=inference, key=key
        )
        return layer, eqx.nn.Linear(9, 1, key=key)

    with jax.numpy_dtype_promotion("standard"):
        model, state = eqx.nn.make_with_state(build)(jax.random.key(0))

    def forward(model, state, x):
        norm = lambda x, state: model[0](x, state)
        h, state = jax.vmap(norm, (0, None), (0, None))(x, state)
        return jax.vmap(model[1])(jnp.tanh(h)), state

    return forward, model, (state, normal(5, 4)), "0/layer/weight", "1/weight"


def equinox_inference():
    return equinox(inference=True)


@pytest.mark.parametrize("build", [linen, haiku, equinox, equinox_inference])
def test_a_power_iteration_is_no_layer(build):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        forward, params, args, normed, plain = build()
        traced = trace(forward, params, args, {})
        report = dsbp_jax.explain(forward, params, *args, rank=1)
    assert [site.name for site in traced.sites] == [plain]
    assert report[normed].view is None
    assert (
        "multiplied with a vector of its own power iteration" in report[normed].reason
    )
    assert "used by div" in report[normed].reason
    assert report[normed].reason.count("power iteration") == 1


def iterate(w, u, steps):
    for _ in range(steps):
        v = u @ w
        v = v / jnp.linalg.norm(v)
        u = v @ w.T
        u = u / jnp.linalg.norm(u)
    return u, v


def penalty(p, x, u):
    """Spectral regularisation: the kernel itself is a layer, and not scaled."""
    u, v = map(stop, iterate(p["a"], u, 2))
    return jnp.sum(f(p, x)) + jnp.vdot(u @ p["a"], v) ** 2


def scaled_answer(p, x, u):
    u, v = iterate(stop(p["a"]), u, 1)
    return (x @ p["a"]) / jnp.vdot(u, p["a"] @ v)


def in_a_loop(p, x, u):
    def step(_, carry):
        return iterate(p["a"], carry[0], 1)

    u, v = map(stop, lax.fori_loop(0, 4, step, (u, jnp.ones(6))))
    return x @ (p["a"] / (u @ p["a"] @ v)) + x @ p["a"]


def differentiated(p, x, u):
    """Nothing is stopped; that the kernel is scaled by it gives it away."""
    u, v = iterate(p["a"], u, 2)
    return x @ (p["a"] / (u @ p["a"] @ v)) + x @ p["a"]


def stacked(p, x, u):
    def layer(h, w):
        left, right = map(stop, iterate(w, u, 1))
        return jnp.tanh(h @ w) / (left @ w @ right), None

    return lax.scan(layer, x, p["stack"])[0]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (penalty, ["a", "b"]),
        (scaled_answer, ["a"]),
        (in_a_loop, ["a"]),
        (differentiated, ["a"]),
        (stacked, ["stack"]),
    ],
)
def test_a_layer_beside_its_power_iteration(model, names):
    traced = trace(model, PARAMS, (X, normal(4)), {})
    assert [site.name for site in traced.sites] == names
    assert traced.sites[0].inputs.num_rows == 5
    *batch, first, second = range(len(traced.sites[0].shape))
    assert traced.sites[0].view == MatrixView((first,), (second,), tuple(batch))
    reasons = [use.reason for use in traced.uses if "power" in use.reason]
    assert len(reasons) == 1


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


def test_views_of_targets_do_not_win():
    def loss(p, x):
        code = stop(x @ p["s"].T)
        return jnp.sum((x @ p["s"] - code) ** 2)

    views = dsbp_jax.layout(loss, PARAMS, X)
    assert views["s"] == MatrixView((0,), (1,))
    assert views["s#1"] == MatrixView((1,), (0,))
