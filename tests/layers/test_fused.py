"""Leaves that are joined into one kernel: each is a layer of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax import explain
from dsbp_jax.layers import MatrixView, capture_activations, layout
from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.rewrite import evaluate
from dsbp_jax.meta.patched import keeps_convolutions, with_activations, with_patches
from tests.layers.models import normal

X = normal(5, 4)


def pair(*shape, other=None):
    return {"a": normal(*shape, seed=1), "b": normal(*(other or shape), seed=2)}


def close(got, wanted, tolerance=2e-6):
    got, wanted = np.asarray(got), np.asarray(wanted)
    scale = max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


def join(axis):
    return lambda p: jnp.concatenate([p["a"], p["b"]], axis)


def find(model, params, *args):
    found = trace(model, params, args, {})
    return {site.name: site for site in found.sites}, dict(found.uses)


def products(fn, *args):
    """How many products a function runs, at the top."""
    names = [e.primitive.name for e in jax.make_jaxpr(fn)(*args).eqns]
    return sum(name in ("dot_general", "conv_general_dilated") for name in names)


# Against the same model with its kernels apart


def test_a_fused_cell_is_seen_as_the_plain_one():
    x = normal(2, 3, 5)
    plain, fused = (
        nn.RNN(cell(4), return_carry=True)
        for cell in (nn.LSTMCell, nn.OptimizedLSTMCell)
    )
    params = plain.init(jax.random.key(0), x)
    wanted = jax.jit(capture_activations(plain.apply))(params, x)
    got = jax.jit(capture_activations(fused.apply))(params, x)
    assert len(got[1]) == 8
    assert dict(layout(fused.apply, params, x)) == dict(layout(plain.apply, params, x))
    assert got[1].keys() == wanted[1].keys()
    jax.tree.map(close, got, wanted)


def heads(p, x):
    return jnp.einsum("bd,dhk->bhk", x, join(1)(p))


def heads_apart(p, x):
    each = lambda w: jnp.einsum("bd,dhk->bhk", x, w)
    return jnp.concatenate([each(p["a"]), each(p["b"])], 1)


def columns_apart(p, x):
    return jnp.concatenate([x @ p["a"], x @ p["b"]], 1)


def rows_apart(p, x):
    return x[:, :3] @ p["a"] + x[:, 3:] @ p["b"]


def experts_apart(p, x):
    return jnp.stack([x[:2] @ p["a"], x[2:4] @ p["b"]])


def nested_apart(p, x):
    top = jnp.concatenate([x[:, :3] @ p["a"], x[:, :3] @ p["b"]], 1)
    return top + x[:, 3:] @ p["c"]


def nested(p, x):
    return x @ jnp.concatenate([join(1)(p), p["c"]], 0)


def rounded(w):
    return w.astype(jnp.bfloat16).astype(w.dtype)


SQUARE, WIDE = pair(4, 2), pair(4, 2, other=(4, 3))
MODELS = {
    "columns": (lambda p, x: x @ join(1)(p), columns_apart, WIDE),
    "rows": (lambda p, x: x @ join(0)(p), rows_apart, pair(3, 2, other=(1, 2))),
    "heads": (heads, heads_apart, pair(4, 2, 3, other=(4, 1, 3))),
    "a stack of blocks": (
        lambda p, x: x @ jnp.stack([p["a"], p["b"]], 1).reshape(4, 4),
        columns_apart,
        SQUARE,
    ),
    "experts": (
        lambda p, x: jnp.einsum(
            "ebd,edk->ebk", x[:4].reshape(2, 2, 4), jnp.stack([p["a"], p["b"]])
        ),
        experts_apart,
        SQUARE,
    ),
    "stored as (out, in), cast": (
        lambda p, x: x @ rounded(join(0)(p)).T,
        lambda p, x: jnp.concatenate([x @ rounded(p[n]).T for n in "ab"], 1),
        jax.tree.map(jnp.round, pair(3, 4, other=(1, 4))),
    ),
    "left operand": (
        lambda p, x: (join(0)(p) @ x.T).T,
        lambda p, x: jnp.concatenate([(p[n] @ x.T).T for n in "ab"], 1),
        pair(3, 4, other=(1, 4)),
    ),
    "a joint of joints": (nested, nested_apart, pair(3, 2) | {"c": normal(1, 4)}),
    "zeros in between": (
        lambda p, x: x @ jnp.concatenate([p["a"], jnp.zeros((4, 2)), p["b"]], 1),
        lambda p, x: jnp.insert(columns_apart(p, x), np.array([2, 2]), 0.0, axis=1),
        WIDE,
    ),
    "next to what is no leaf": (
        lambda p, x: x @ jnp.concatenate([p["a"], 2.0 * p["b"]], 1),
        lambda p, x: jnp.concatenate([x @ p["a"], x @ (2.0 * p["b"])], 1),
        WIDE,
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_parts_are_seen_as_layers_apart(case):
    fused, apart, params = MODELS[case]
    close(fused(params, X), apart(params, X))  # the test itself
    out, got = capture_activations(fused)(params, X)
    np.testing.assert_array_equal(out, fused(params, X))
    _, wanted = jax.jit(capture_activations(apart))(params, X)
    assert got.keys() == wanted.keys()
    jax.tree.map(close, got, wanted)
    assert dict(layout(fused, params, X)) == dict(layout(apart, params, X))
    loss = lambda fn: lambda p: jnp.sum(jnp.sin(fn(p, X)))
    grads = lambda fn: jax.jit(jax.grad(loss(fn)))(params)
    captured = lambda p, x: capture_activations(fused)(p, x)[0]
    jax.tree.map(close, grads(captured), grads(apart))


@pytest.mark.parametrize("axis", ["O", "I"])
@pytest.mark.parametrize(
    "numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC")]
)
class TestConvolutions:
    """Kernels joined along their output or their input channels."""

    def problem(self, axis, numbers):
        sizes = dict(N=2, C=5, H=5, W=6, O=4, I=5)
        kernel = [{**sizes, "H": 3, "W": 2}[name] for name in numbers[1]]
        at, first, second = numbers[1].index(axis), kernel[:], kernel[:]
        first[at], second[at] = 3, kernel[at] - 3
        channels = numbers[0].index("C")

        def convolve(x, w):
            return lax.conv_general_dilated(
                x, w, (2, 1), "SAME", dimension_numbers=numbers
            )

        def apart(p, x):
            if axis == "O":
                each = [convolve(x, p[name]) for name in "ab"]
                return jnp.concatenate(each, numbers[2].index("C"))
            parts = jnp.split(x, [3], channels)
            return convolve(parts[0], p["a"]) + convolve(parts[1], p["b"])

        fused = lambda p, x: convolve(x, join(at)(p))
        x = normal(*(sizes[name] for name in numbers[0]))
        return fused, apart, pair(*first, other=second), x

    def test_parts_are_seen_as_layers_apart(self, axis, numbers):
        fused, apart, params, x = self.problem(axis, numbers)
        _, wanted = jax.jit(capture_activations(apart))(params, x)
        for capture in (capture_activations, with_activations):
            out, got = jax.jit(capture(fused))(params, x)
            close(out, fused(params, x), 2e-5)
            jax.tree.map(lambda a, b: close(a, b, 2e-5), got, wanted)
        views = dict(layout(fused, params, x))
        assert views == dict(layout(apart, params, x))
        assert views["a"].window_axes(4) == tuple(map(numbers[1].index, "HW"))

    def test_meta_learning_still_runs_it_as_one_product(self, axis, numbers):
        fused, _, params, x = self.problem(axis, numbers)
        assert not keeps_convolutions(fused, params, x)
        program = jax.make_jaxpr(with_patches(fused))(params, x)
        assert "conv_general_dilated" not in str(program)
        assert str(program).count("dot_general[") == 1
        close(with_patches(fused)(params, x), fused(params, x), 2e-5)

    def test_another_convolution_is_not_hidden_by_two_parts(self, axis, numbers):
        fused, _, params, x = self.problem(axis, numbers)
        plain = lambda p, x: jnp.sum(
            lax.conv(x, jnp.ones((2, x.shape[1], 1, 1)), (1, 1), "SAME")
        )
        both = lambda p, x: fused(p, x) + plain(p, x)
        assert keeps_convolutions(both, params, x)


# Loops and branches


def fused_blocks(p, x):
    """Stacked kernels, joined outside of the loop, inside of it and as a constant."""
    stack = jnp.concatenate([p["q"], p["k"]], -1)
    shared = jnp.concatenate([p["a"], p["b"]], 0)

    def block(h, slices):
        qk, v, w = slices
        u = jnp.tanh(h @ qk) @ jnp.concatenate([v, w], 1)
        return jnp.tanh(jnp.concatenate([u, h], 1) @ shared), u

    return lax.scan(block, x, (stack, p["v"], p["w"]))


def apart_blocks(p, x):
    def block(h, slices):
        q, k, v, w = slices
        u = jnp.tanh(jnp.concatenate([h @ q, h @ k], 1))
        u = jnp.concatenate([u @ v, u @ w], 1)
        return jnp.tanh(u @ p["a"] + h @ p["b"]), u

    return lax.scan(block, x, (p["q"], p["k"], p["v"], p["w"]))


BLOCKS = {
    "q": normal(3, 4, 2),
    "k": normal(3, 4, 1, seed=1),
    "v": normal(3, 3, 2, seed=2),
    "w": normal(3, 3, 4, seed=3),
    "a": normal(6, 4, seed=4),
    "b": normal(4, 4, seed=5),
}


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.checkpoint, jax.jit])
def test_in_loops(wrap):
    got = jax.jit(capture_activations(wrap(fused_blocks)))(BLOCKS, X)
    wanted = jax.jit(capture_activations(apart_blocks))(BLOCKS, X)
    assert got[1].keys() == set(BLOCKS)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), got, wanted)


def test_a_joint_that_every_branch_returns():
    def model(p, x):
        w = lax.cond(x[0, 0] > 0, join(1), join(1), p)
        return lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: 2.0 * x @ w, x)

    out, seen = capture_activations(model)(WIDE, X)
    close(out, model(WIDE, X))
    assert set(seen) == {"a", "b", "a#1", "b#1"}
    taken = [int(seen[name].count) for name in ("a", "b", "a#1", "b#1")]
    assert sorted(taken) == [0, 0, 5, 5]


# Each equation runs once


@pytest.mark.parametrize(("which", "more"), [("inputs", 0), ("outputs", 2)])
def test_the_product_is_not_run_for_every_part(which, more):
    captured = lambda fn: capture_activations(fn, which=(which,))
    columns, rows = MODELS["columns"], MODELS["rows"]
    assert products(captured(columns[0]), columns[2], X) == 1
    # What each leaf adds to a sum is asked for as an output only.
    assert products(captured(rows[0]), rows[2], X) == 1 + more


def test_evaluate_visits_every_part_once():
    fused, _, params = MODELS["columns"]
    traced, visited = trace(fused, params, (X,), {}), []

    def visit(product, x, w, extra):
        visited.append(product.site.name)
        assert w.shape == (4, 5)
        return product(x, w), extra

    extras = {"a": jnp.ones(2), "b": jnp.ones(3)}
    (out,), found = evaluate(traced, visit, array_leaves((params, X)), extras)
    np.testing.assert_array_equal(out, fused(params, X))
    assert visited == ["a", "b"]
    assert {name: extra.shape for name, extra in found.items()} == {
        "a": (2,),
        "b": (3,),
    }


# Views and reasons


@pytest.mark.parametrize(
    ("arrange", "view"),
    [
        (lambda w: w.T.T, MatrixView((0,), (1,))),
        (lambda w: w[None, :, :, None].squeeze((0, 3)), MatrixView((0,), (1,))),
        (lambda w: w.reshape(4, 2, 2, 2).reshape(4, 8), MatrixView((0,), (1,))),
        (lambda w: w.reshape(1, 4, 8, 1).reshape(4, 8), MatrixView((0,), (1,))),
        (lambda w: w.reshape(2, 2, 8).reshape(4, 8), MatrixView((0,), (1,))),
        (lambda w: jnp.flip(w, 1), MatrixView((0,), (1,))),
        (lambda w: lax.optimization_barrier((w, X))[0], MatrixView((0,), (1,))),
    ],
)
def test_layout_operations_after_the_joint(arrange, view):
    model = lambda p, x: x @ arrange(join(1)(p))
    params = pair(4, 4)
    sites, uses = find(model, params, X)
    assert not uses
    assert {name: site.view for name, site in sites.items()} == {"a": view, "b": view}
    _, seen = capture_activations(model)(params, X)
    for name in "ab":
        np.testing.assert_array_equal(seen[name].inputs, X)
        close(seen[name].outputs, X @ params[name])


DATA = np.ones((4, 2), np.float32)
TAPS = lambda p, x: lax.conv(x.reshape(1, 4, 1, 5), join(3)(p), (1, 1), "SAME")


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (lambda p, x: x @ join(1)(p)[:, 1:], (4, 2), "then sliced before use"),
        (lambda p, x: x @ (2.0 * join(1)(p)), (4, 2), "then used by mul"),
        (lambda p, x: x @ join(1)(p).reshape(4, 4), (2, 4), "then used by reshape"),
        (lambda p, x: join(0)(p), (4, 2), "then returned by the function"),
        (lambda p, x: X.T @ x @ join(1)(p) @ join(1)(p), (4, 2), None),
        (lambda p, x: x @ (join(0)(p).T @ join(0)(p)), (2, 4), "parameters or const"),
        (TAPS, (2, 4, 1, 2), "some taps of a convolution kernel"),
        (
            lambda p, x: lax.scan(
                lambda h, w: (h @ w, None), x, jnp.stack([p["a"], p["b"]])
            )[0],
            (4, 4),
            "store them as one stacked leaf",
        ),
        (
            lambda p, x: x @ jnp.concatenate([p["a"], x.T[:, :2], p["b"]], 1),
            (4, 2),
            "joined with data (concatenate); multiply the parts apart",
        ),
        (
            lambda p, x: x @ jnp.concatenate([p["a"], DATA, p["b"]], 1),
            (4, 2),
            "joined with data (concatenate); multiply the parts apart",
        ),
    ],
)
def test_what_is_not_followed_is_named(model, shape, reason):
    params = pair(*shape)
    sites, uses = find(model, params, X)
    if reason is None:
        assert len(sites) == 4
        assert not uses
        return
    assert not sites
    table = explain(model, params, X)
    for name in "ab":
        assert reason in uses[name]
        assert reason in table[name].reason
        assert "multiply the parts apart" in uses[name] or "store them" in uses[name]


def test_joined_biases_get_no_remedy_for_matrices():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, uses = find(lambda p, x: x + join(0)(p), params, X)
    assert uses["a"] == "joined with other arrays, then used by add"


def test_a_token_joined_to_data_does_not_hide_the_layers_after_it():
    def model(p, x):
        return jnp.concatenate([p["token"], x]) @ p["w"]

    sites, uses = find(model, {"token": normal(1, 4), "w": normal(4, 3)}, X)
    assert set(sites) == {"w"}
    assert "joined with data" in uses["token"]
