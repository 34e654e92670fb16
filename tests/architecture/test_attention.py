"""Attention, alone and in a scanned stack: heads and layers choose for themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from dsbp_jax.architecture import pairs
from dsbp_jax.layers import map_paths
from tests.architecture import models
from tests.architecture.test_compression import close
from tests.layers.models import normal

found = functools.cache(
    lambda build: (
        model := build(),
        architecture.groups(model.fn, model.params, model.x),
    )
)
BUILDS = (models.linen_vit, models.linen_scanned)


def attention(name):
    return f"MultiHeadDotProductAttention_0/{name}"


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_groups_of_transformers(build):
    _, groups = found(build)
    scanned = build is models.linen_scanned
    blocks = ["blocks"] if scanned else ["LinenBlock_0", "LinenBlock_1"]
    first = int(scanned)  # where the axes begin that are no stack
    for block in blocks:
        at = lambda name, block=block: f"params/{block}/{name}"
        query = groups[at(attention("query/kernel:2"))]
        assert {(p.path, p.axis) for p in query.places} == {
            (at(attention(f"{name}/{leaf}")), first + axis)
            for name in ("query", "key")
            for leaf, axis in (("kernel", 2), ("bias", 1))
        }
        assert (query.size, len(query.pairs), query.sinks) == (8, 1, ())
        value = groups[at(attention("value/kernel"))]
        assert value.rotated
        assert {(p.path, p.axis) for p in value.places} == {
            (at(attention("value/kernel")), first + 2),
            (at(attention("value/bias")), first + 1),
            (at(attention("out/kernel")), first + 1),
        }
        assert value.entries == query.entries == ((2, 2) if scanned else (2,))
        heads = groups[at(attention("query/kernel"))]
        assert (heads.size, heads.reason[:8]) == (2, "an index")
        mlp = groups[at("Dense_0/kernel")]
        assert (mlp.size, mlp.entries) == (24, (2,) if scanned else ())
    stream = groups["params/Conv_0/kernel"]
    assert stream.size == 16
    assert stream.merged
    if scanned:
        assert (
            groups.reasons["params/blocks/Dense_0/kernel", 0] == "stacked over a loop"
        )


def half_dead(path, leaf):
    """Another half of each head and layer, and copies among the MLP's neurons."""
    if "Dense_0" in path and "lock" in path:
        return leaf.at[..., 18:].set(leaf[..., :6])
    if not any(f"/{name}/" in path for name in ("query", "key", "value")):
        return leaf
    alive = np.ones((2, 2, 8), leaf.dtype)
    for layer, head in np.ndindex(2, 2):
        start = 3 * head + layer + ("value" in path)
        alive[layer, head, (start + np.arange(4)) % 8] = 0
    if "blocks/" not in path:
        return leaf * alive[int("Block_1" in path)]
    return leaf * (alive[:, None] if "kernel" in path else alive)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_halves_of_heads_and_copies_are_cut(build):
    model, _ = found(build)
    params = map_paths(half_dead, model.params)
    plan = architecture.plan(model.fn, params, [model.x], energy=1.0, multiple_of=1)
    for one in plan.groups:
        if one.group.merged:  # the stream, of which nothing is a copy
            assert one.width == one.group.size
        else:
            assert one.width == (18 if "Dense" in one.group.name else 4)
    small = architecture.compress(model.fn, params, plan)
    wanted = jax.jit(model.fn)(params, model.x)
    close(jax.jit(small.apply)(small.params, model.x), wanted, 1e-5)


def test_queries_and_keys_lose_what_is_predicted():
    """The mean square of the products that are gone, q and k of independent rows."""
    q, k = normal(300, 6), normal(200, 6, seed=1) * jnp.arange(1.0, 7)
    moments = pairs.PairMoments(1, 6)
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    moments.add((q.T @ q / 300)[None], (k.T @ k / 200)[None])
    order, total = pairs.order([moments], 0)
    assert total == pytest.approx(np.mean((q @ k.T) ** 2))
    for width in range(7):
        gone = order.neurons[width:]
        lost = np.mean((q[:, gone] @ k[:, gone].T) ** 2)
        assert order.errors[width] == pytest.approx(lost / total, abs=1e-12)
    assert order.neurons[0] == 5
    values = np.linalg.svd(q @ k.T, compute_uv=False) ** 2 / (300 * 200)
    np.testing.assert_allclose(pairs.spectrum(moments, 0), values[:6], rtol=1e-6)


def test_heads_need_their_own_axis_to_choose_for_themselves():
    """A bias that all heads share makes them choose alike."""

    def fn(params, x):
        split = lambda w: (x @ w).reshape(5, 2, 4) + params["shared"]
        q, k = split(params["q"]), split(params["k"])
        logits = jnp.einsum("thd,shd->hts", q, k)
        return jnp.einsum("hts,sc->htc", jax.nn.softmax(logits), x @ params["v"])

    params = {
        "q": normal(3, 8),
        "k": normal(3, 8),
        "v": normal(3, 2),
        "shared": normal(4),
    }
    groups = architecture.groups(fn, params, normal(5, 3))
    (paired,) = (group for group in groups.groups if group.pairs)
    assert paired.entries == ()
