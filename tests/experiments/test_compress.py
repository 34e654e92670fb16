"""Trained models, cut in every way, and tuned again."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsbp_jax.architecture.axis_walk import trace_axes
from dsbp_jax.architecture.groups import groups_of
from experiments import compression_rivals, models
from experiments.compression_config import METHODS, CompressionConfig
from experiments.compression_rivals import RIVALS
from experiments.config import ModelConfig
from experiments.study.cells import Spec, Store
from experiments.tasks import compression
from tests.experiments.commands import fails

CONFIG = CompressionConfig(
    model=ModelConfig("mlp", {"hidden": (32, 24)}),
    optimizer="adam:learning_rate=0.003",
    epochs=12,
    batch_size=64,
    images=500,
    tune_rate=1e-3,
    timed_batch=8,
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A run of every way to cut, with the model of one training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_PASSES", 2)
        store = Store(tmp_path_factory.mktemp("cells"))
        configs = [CONFIG.with_contender(f"{method}:flops=0.5") for method in METHODS]
        found = store.run([Spec(config) for config in configs])
    return dict(zip(METHODS, found, strict=True))


@pytest.mark.slow
def test_every_method_keeps_to_the_flops_and_ours_is_ahead(cells):
    assert {*RIVALS, "spectral", "whole"} == set(METHODS)
    whole = cells.pop("whole").test
    assert whole["flops"] == 1
    assert whole["before"] > 0.8
    for method, cell in cells.items():
        assert cell.test["flops"] <= 0.5 + 1e-9, method
        assert 0 < cell.test["latency"] < math.inf
        assert 0 <= cell.test["before"] <= 1
        assert cell.steps == 19
    before = {method: cell.test["before"] for method, cell in cells.items()}
    assert before["spectral"] >= max(before["random"], before["unrepaired"])
    tuned = cells["random"].test
    assert tuned["accuracy"] > tuned["before"]


def test_all_begin_with_the_same_model():
    arrays = [
        compression._WHOLE.arrays(CONFIG.with_contender(method).trained())
        for method in ("spectral", "l1")
    ]
    assert arrays[0] is arrays[1]
    other = dataclasses.replace(CONFIG, seed=1).trained()
    kernel = lambda found: found["params"]["head"]["kernel"]
    assert not np.array_equal(
        kernel(arrays[0]), kernel(compression._WHOLE.arrays(other))
    )


def test_cut_models_have_statistics_of_their_own():
    config = dataclasses.replace(
        CONFIG, model=ModelConfig("conv4", {"channels": 8}), epochs=2, multiple_of=2
    ).with_contender("l1")
    task = compression.CompressionTask(config)
    small, batches = task.small(config), task.seen()
    follow = jax.jit(lambda *args: small.train(*args)[1])

    def after(passes, rest):
        for _ in range(passes):
            for x in batches:
                rest = follow({**small.arrays, "rest": rest}, x)
        return jax.tree.leaves(rest)

    found = small.arrays["rest"]
    begun = jax.tree.map(jnp.zeros_like, found)
    # Of momentum 0.99.
    wanted, early = after(600, begun), after(200, begun)
    assert len(wanted) == 8
    for own, exact, before in zip(jax.tree.leaves(found), wanted, early, strict=True):
        off = lambda x, exact=exact: float(
            jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)
        )
        assert off(own) < 0.01 < 0.1 < off(before)


def test_what_no_batch_moves_stays():
    x = jnp.ones((4, 3))
    rest = {"mean": jnp.full(3, 7.0), "still": jnp.full(2, 5.0), "count": jnp.int32(9)}
    arrays = {"params": {}, "rest": rest}

    def train(arrays, x):
        mean = 0.5 * arrays["rest"]["mean"] + 0.5 * x.mean(0) * jnp.array([2, 0, -3])
        return x, {**arrays["rest"], "mean": mean, "count": arrays["rest"]["count"] + 1}

    found = compression.settled(train, arrays, [x, x, x[:1]])["rest"]
    np.testing.assert_allclose(found["mean"], [2, 0, -3], rtol=1e-6)
    np.testing.assert_array_equal(found["still"], rest["still"])
    assert found["count"] == 9
    nothing = {"params": {}, "rest": {}}
    assert compression.settled(train, nothing, [x]) is nothing


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="method='taylor'; accepted are spectral"):
        CONFIG.with_contender("taylor")
    with pytest.raises(ValueError, match="option of l1='flop'; accepted are flops"):
        CONFIG.with_contender("l1:flop=0.5")
    with pytest.raises(ValueError, match="flops=2"):
        CONFIG.with_contender("l1:flops=2")
    line = fails("train", ["compression", "--epochs", "0"], capsys)
    assert "epochs=0; accepted are" in line


def test_rivals_cut_the_features_of_heads():
    model = models.build(
        "vit",
        image_shape=(8, 8, 1),
        num_classes=3,
        rngs=nnx.Rngs(0),
        patch=4,
        dim=16,
        depth=1,
        heads=2,
    )
    graph, params = nnx.split(model)
    apply = lambda params, x: nnx.merge(graph, params)(x)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    structure = trace_axes(apply, params, (x,))
    norms = {
        group.name: compression_rivals._norms(structure, group, params)
        for group in groups_of(structure).groups
        if group.entries and not group.reason
    }
    attention = params["blocks"][0]["attention"]
    size = {
        name: np.abs(attention[name]["kernel"][...]).mean(0)
        for name in ("query", "key", "value")
    }
    wanted = [size["query"] + size["key"], size["value"]]
    assert len(norms) == len(wanted)
    for found in norms.values():
        assert any(np.allclose(found, one) for one in wanted)
    for method in ("l1", "magnitude", "random"):
        small = RIVALS[method](apply, params, [x], 0.6, 2, 0)
        assert small.flops <= 0.6
        assert small.resized(apply)(small.arrays, x).shape == (4, 3)


@pytest.mark.parametrize("method", ["svd", "factors"])
def test_factors_are_trained_where_their_kernels_were(method):
    fn = lambda arrays, x: (
        np.tanh(1) * x @ arrays["params"]["up"] @ arrays["params"]["down"]
        + arrays["rest"]["mean"]
    )
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    arrays = {
        "params": {"up": normal(24, 32), "down": normal(32, 16)},
        "rest": {"mean": normal(16)},
    }
    x = normal(50, 24)
    small = RIVALS[method](fn, arrays, [x], 0.6, 1, 0)
    assert small.flops <= 0.6
    assert set(small.arrays) == {"params", "rest"}
    assert any(
        set(kernel) == {"a", "b"}
        for kernel in small.arrays["params"].values()
        if isinstance(kernel, dict)
    )
    run = small.resized(fn)
    twice = small.resized(lambda arrays, x: (2 * fn(arrays, x), arrays["rest"]))
    y, rest = twice(small.arrays, x)
    np.testing.assert_allclose(y, 2 * run(small.arrays, x), rtol=1e-5)
    assert rest["mean"].shape == (16,)
    grads = jax.grad(lambda params: run({**small.arrays, "params": params}, x).sum())
    found = jax.tree.leaves(grads(small.arrays["params"]))
    assert len(found) >= 3
    assert all(jnp.any(one != 0) for one in found)
