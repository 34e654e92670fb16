"""Moved passes of stacks, heads and convolutions, against one layer by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.inference.inputs import (
    arguments,
    movable,
    moved_pass,
    watched_pass,
)
from dsbp_jax.layers import trace
from dsbp_jax.linalg import EigenBasis, Spiked, absorb, transport

DIM, DEPTH, ROWS = 4, 3, 32
WEIGHT = 0.8


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def known(seed, *batch):
    """Models of whole spaces."""
    vectors = jnp.linalg.qr(normal(seed, *batch, DIM, DIM))[0]
    values = jnp.sort(jnp.abs(normal(seed + 1, *batch, DIM)) + 0.5)[..., ::-1]
    return Spiked(
        normal(seed + 2, *batch, DIM), EigenBasis(vectors, values, values.sum(-1))
    )


def run(fn, params, x, source, models):
    @jax.jit
    def both(params, x):
        traced = trace(fn, params, (x,), {})
        arrays = arguments(params, x)
        args = traced, arrays, source, models, WEIGHT, 10_000, 10.0
        return moved_pass(*args), watched_pass(traced, arrays, models, WEIGHT, 10_000)

    return both(params, x)


def close(found, wanted):
    """Models agree in mean and covariance; eigenvectors have no sign."""
    cov = lambda m: (
        (m.basis.vectors * m.basis.values[..., None, :]) @ m.basis.vectors.mT
    )
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-4)
    np.testing.assert_allclose(cov(found), cov(wanted), atol=1e-3)


def test_a_scanned_stack_is_its_layers_one_by_one():
    stack = 0.5 * normal(0, DEPTH, DIM, DIM)
    source, models = known(1, DEPTH), known(5, DEPTH)
    pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)

    def scanned(params, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(body, x, params["w"])[0]

    def plain(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return x

    apart = {f"{i}": stack[i] for i in range(DEPTH)}
    each = [{n: pick(t, int(n)) for n in apart} for t in (source, models)]
    x = normal(9, ROWS, DIM)
    found = run(scanned, {"w": stack}, x, {"w": source}, {"w": models})
    wanted = run(plain, apart, x, *each)
    for (out, after), (other, others) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(out, other, atol=1e-4)
        for i in range(DEPTH):
            close(pick(after["w"], i), others[f"{i}"])


@pytest.mark.slow
def test_heads_are_moved_each_by_its_own_map():
    w, source, models = normal(0, 2, DIM, 3), known(1, 2), known(5, 2)
    fn = lambda params, x: jnp.einsum("nhd,hdk->nhk", x, params["w"])
    x = normal(9, ROWS, 2, DIM)
    (out, after), _ = run(fn, {"w": w}, x, {"w": source}, {"w": models})
    for head in range(2):
        s, t = (jax.tree.map(lambda a, h=head: a[h], m) for m in (source, models))
        new = absorb(t, x[:, head], jnp.float32(WEIGHT))
        moved = transport(s, new)(x[:, head])
        np.testing.assert_allclose(out[:, head], moved @ w[head], atol=1e-3)
        close(jax.tree.map(lambda a, h=head: a[h], after["w"]), new)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_convolution_of_moved_channels(layout):
    numbers = (layout, "HWIO", layout)
    fn = lambda params, x: jax.lax.conv_general_dilated(
        x, params["w"], (2, 2), "SAME", dimension_numbers=numbers
    )
    w, source, models = normal(0, 3, 3, DIM, 5), known(1), known(5)
    x = normal(9, 4, 6, 6, DIM)
    new = absorb(models, x.reshape(-1, DIM), jnp.float32(WEIGHT))
    moved = transport(source, new)(x.reshape(-1, DIM)).reshape(x.shape)
    if layout == "NCHW":
        x, moved = (jnp.moveaxis(one, -1, 1) for one in (x, moved))
    (out, after), _ = run(fn, {"w": w}, x, {"w": source}, {"w": models})
    # The padding is zero before and after: only what is there is moved.
    np.testing.assert_allclose(out, fn({"w": w}, moved), atol=1e-3)
    close(after["w"], new)


def test_what_cannot_be_moved_is_left_out():
    def fn(params, x):
        for _ in range(2):
            x = jnp.tanh(x @ params["alone"])
        x = x @ jnp.concatenate([params["left"], params["right"]], axis=1)
        x = jax.lax.scan(lambda x, _: (x @ params["shared"], None), x, length=2)[0]
        branch = lambda x: x @ params["branch"]
        return jax.lax.cond(x[0, 0] > 0, branch, lambda x: x, x)

    half, whole = normal(0, DIM, 2), normal(1, DIM, DIM)
    names = dict.fromkeys(("alone", "shared", "branch"), whole)
    params = {**names, "left": half, "right": half}
    sites = movable(trace(fn, params, (normal(2, ROWS, DIM),), {}))
    assert [site.name for site in sites] == ["alone", "alone#1"]
