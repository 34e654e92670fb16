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
from dsbp_jax.layers import capture_activations, layout
from dsbp_jax.layers.finder import trace
from tests.layers.models import normal
from tests.layers.test_dataflow import PARAMS, X, f, sites
from tests.layers.traces import find

pytestmark = pytest.mark.usefixtures("strict_promotion")

stop = lax.stop_gradient


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


def test_views_of_targets_do_not_win():
    def loss(p, x):
        code = stop(x @ p["s"].T)
        return jnp.sum((x @ p["s"] - code) ** 2)

    views = dsbp_jax.layout(loss, PARAMS, X)
    assert views["s"] == MatrixView((0,), (1,))
    assert views["s#1"] == MatrixView((1,), (0,))


def test_uses_are_numbered_and_keyed():
    shared = jax.jit(lambda x, w: x @ w)
    model = lambda p, x: shared(shared(x, p["w"]), p["w"])
    sites, _ = find(model, {"w": jnp.zeros((4, 4))}, X)
    assert list(sites) == ["w", "w#1"]
    assert sites["w"].key != sites["w#1"].key


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


# Marks of further uses


HASHES = {"a#b": normal(12, 16) / 4, "w#1": normal(16, 14, seed=1) / 4}


def hashed(params, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a#b"]) @ params["w#1"]) ** 2)


@pytest.mark.slow
def test_a_path_may_hold_the_mark_of_further_uses():
    x = normal(64, 12, seed=2)
    assert list(layout(hashed, HASHES, x)) == ["a#b", "w#1"]
    _, found = jax.jit(capture_activations(hashed))(HASHES, x)
    assert {name: layer.inputs.shape for name, layer in found.items()} == {
        "a#b": (64, 12),
        "w#1": (64, 16),
    }
    report = dsbp_jax.explain(hashed, HASHES, x, rank=4)
    assert not any("further" in entry.reason for entry in report.values())
    backprop = dsbp_jax.spectral_backprop(hashed, 4, refresh_every=2)
    state = jax.jit(backprop.init)(HASHES, x, key=jax.random.key(0))
    _, grads, state = jax.jit(backprop.value_and_grad)(HASHES, state, x)
    exact = jax.jit(jax.grad(hashed))(HASHES, x)
    bases = dsbp_jax.bases(state)
    assert set(bases) == set(HASHES)
    training = dsbp_jax.spectral_coordinates(hashed, 4)
    coords, frame = jax.jit(training.init)(HASHES, x, key=jax.random.key(0))
    assert set(frame.kernels) == set(HASHES)
    for path, gradient in grads.items():
        assert np.linalg.norm(gradient) < np.linalg.norm(exact[path])
        assert coords[path].shape == (4, HASHES[path].shape[1])


def test_a_mark_that_a_further_use_needs_too():
    params = {"w": normal(4, 4), "w#1": normal(4, 4, seed=1)}
    twice = lambda p, x: x @ p["w"] @ p["w"] @ p["w#1"]
    with pytest.raises(ValueError, match=r"'w#1' is the path of a leaf and the name"):
        layout(twice, params, normal(5, 4))
    with pytest.raises(ValueError, match=r"'w#1' is the path of a leaf and the name"):
        dsbp_jax.explain(twice, params, normal(5, 4))
    once = lambda p, x: x @ p["w"] @ p["w#1"]
    assert list(layout(once, params, normal(5, 4))) == ["w", "w#1"]
