"""Trained models, tuned for another task in every way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsbp_jax
from experiments import data, models
from experiments.config import ModelConfig
from experiments.flax_lora import with_lora
from experiments.study.cells import Spec, Store
from experiments.tasks.transfer import TransferTask
from experiments.transfer_config import METHODS, TransferConfig
from experiments.transfer_methods import HEAD, KINDS
from tests.experiments.commands import fails

CONFIG = TransferConfig(
    model=ModelConfig("mlp", {"hidden": (32, 24)}),
    optimizer="adam:learning_rate=0.003",
    epochs=8,
    batch_size=32,
    labels=60,
    rank=3,
    images=300,
    source_rank=12,
    tune_steps=60,
    tune_rate=3e-3,
)
STRICT = "spectral_lora:start=null,train=output"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A run of every way to tune, with the model of one training."""
    store = Store(tmp_path_factory.mktemp("cells"))
    # The others are held to these below, by fewer steps.
    contenders = [m for m in METHODS if m not in ("l2sp", "spectral_transfer")]
    contenders.append(STRICT)
    configs = [
        dataclasses.replace(CONFIG.with_contender(method), strength=3000)
        for method in contenders
    ]
    found = store.run([Spec(config) for config in configs])
    return dict(zip(contenders, found, strict=True))


@pytest.mark.slow
def test_every_method_learns_and_those_that_hold_back_keep_more(cells):
    assert {*KINDS} == {*METHODS}
    tests = {method: cell.test for method, cell in cells.items()}
    for method, test in tests.items():
        assert test["accuracy"] > 0.35, method  # chance is 0.2
    kept = {method: test["kept"] for method, test in tests.items()}
    assert kept["probe"] > 0.9  # the source's own accuracy: its body is as it was
    for method in ("ewc", "replay", "project_away", STRICT):
        assert kept[method] > kept["full"], method
    whole = tests["full"]["trained"]
    assert tests["ewc"]["trained"] == tests["project_away"]["trained"] == whole
    assert tests["probe"]["trained"] == 24 * 5 + 5
    assert tests[STRICT]["trained"] == 24 * 5 + 5 + 3 * (32 + 24)
    adapters = 24 * 5 + 5 + 3 * (64 + 32 + 32 + 24)
    assert tests["lora"]["trained"] == tests["spectral_lora"]["trained"] == adapters


def steps(method, count=2, **changes):
    """A task, and a state after some steps."""
    config = dataclasses.replace(CONFIG.with_contender(method), **changes)
    task = TransferTask(config)
    state = task.init(config)
    for number in range(count):
        state, _ = task.step(state, config, number)
    return task, state


def test_strength_zero_is_plain_tuning_bit_for_bit():
    _, full = steps("full")
    for method in ("l2sp", "spectral_transfer"):
        _, held = steps(f"{method}:strength=0")
        jax.tree.map(np.testing.assert_array_equal, held.trained, full.trained)


def test_a_great_strength_holds_the_body_and_nothing_is_lost_to_nan():
    task, start = steps("l2sp", 0)
    for method in ("l2sp", "spectral_transfer"):
        _, state = steps(f"{method}:strength=1e6", 5)
        assert all(bool(jnp.isfinite(w).all()) for w in jax.tree.leaves(state.trained))
    moved = jnp.abs(state.trained[HEAD]["kernel"] - start.trained[HEAD]["kernel"])
    assert moved.max() > 0
    assert task.metrics["kept"].examples == len(task.source.test)


def test_the_fisher_is_the_mean_square_of_gradients():
    """Against a gradient of each example by itself, at labels that are drawn alike."""
    task, state = steps("ewc", 0, images=35)
    assert all(
        bool((leaf >= 0).all()) for leaf in jax.tree.leaves(state.held["weights"])
    )
    params = {**state.held["source"], HEAD: state.source[HEAD]}
    images = task.normalized(task.source.train.images[:32])
    keys = jax.random.split(jax.random.key(0), 32)

    @jax.jit
    def gradient(x, key):
        answer = lambda params: task.answer(params, state.source["rest"], x[None])[0]
        drawn = jax.random.categorical(key, answer(params))
        return jax.grad(lambda p: jax.nn.log_softmax(answer(p))[drawn])(params)

    squares = [
        np.square(gradient(x, key)["layers"][0]["kernel"])
        for x, key in zip(images, keys, strict=True)
    ]
    np.testing.assert_allclose(
        state.held["weights"]["layers"][0]["kernel"],
        np.mean(squares, axis=0),
        rtol=1e-4,
        atol=1e-8,
    )


def test_a_part_of_the_classes_and_a_few_of_each():
    digits = data.load("digits")
    part = data.with_classes(digits, 5, 10)
    assert part.num_classes == 5
    assert {*part.test.labels} == {0, 1, 2, 3, 4}
    some = data.few(part.train, 13, seed=1)
    assert sorted(np.bincount(some.labels)) == [2, 2, 3, 3, 3]
    other = data.few(part.train, 13, seed=2)
    assert not np.array_equal(some.images, other.images)


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="method='l2'; accepted are full"):
        CONFIG.with_contender("l2")
    with pytest.raises(ValueError, match="option of lora='strength'; accept"):
        CONFIG.with_contender("lora:strength=1")
    with pytest.raises(ValueError, match="strength='much'; accepted are numbers"):
        CONFIG.with_contender("l2sp:strength=much")
    with pytest.raises(ValueError, match="start='lora'"):
        CONFIG.with_contender("spectral_lora:start=lora")
    with pytest.raises(ValueError, match="labels=4; accepted are 5"):
        TransferTask(dataclasses.replace(CONFIG, labels=4))
    line = fails("train", ["transfer", "--labels", "0"], capsys)
    assert "labels=0; accepted are" in line


def test_lora_modules_of_flax_start_alike_and_answer_alike():
    model = models.build("mlp", image_shape=(8, 8, 1), num_classes=5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)
    x = jnp.asarray(data.load("digits").train.images[:64], jnp.float32) / 255
    lora = dsbp_jax.spectral_lora(fn, 3, start="random", train="output")
    adapters, frame = lora.init(params, x, key=jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    wrapped = with_lora(nnx.merge(graph, params), adapters, frame)
    wanted = fn(lora.merge(adapters, frame), x)
    np.testing.assert_allclose(wrapped(x), wanted, rtol=1e-4, atol=1e-5)
    trained = jax.tree.leaves(nnx.state(wrapped, nnx.LoRAParam))
    assert len(trained) == 6
    with pytest.raises(ValueError, match="is of a LoRA; accepted are"):
        with_lora(wrapped, adapters, frame)
