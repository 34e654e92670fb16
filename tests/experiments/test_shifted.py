"""Methods of test-time adaptation in one harness, and its command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import inference, shifted_rivals
from experiments.data.loading import load
from experiments.shifted_config import METHODS, ShiftedConfig
from experiments.tasks import shifted
from tests.experiments.commands import fails
from tests.experiments.small_runs import Restless


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    own = ShiftedConfig().smoke()
    return dataclasses.replace(
        own, epochs=8, steps=None, models=tmp_path_factory.mktemp("models")
    )


@pytest.fixture(scope="module")
def model(config):
    return shifted.deployed(config)


def test_a_model_is_trained_once(config, model):
    (file,) = config.models.iterdir()
    again = shifted.deployed(config)
    jax.tree.map(np.testing.assert_array_equal, model.arrays, again.arrays)
    assert list(config.models.iterdir()) == [file]


PLAIN = [name for name in METHODS if name not in shifted_rivals.NORMALISED]


@pytest.mark.parametrize("name", PLAIN)
def test_every_method_answers_clean_data_like_the_model(config, model, name):
    method = shifted_rivals.build(name, model)
    clean = dataclasses.replace(config, setting="clean", method=name)
    found = shifted.follow(clean, model, method, "test", 90)
    assert found.right.mean() > 0.75
    assert found.by_shift() == {"clean": pytest.approx(found.right.mean())}
    assert np.all(np.isfinite(found.losses))


@pytest.fixture(scope="module")
def normalised():
    """A model with batch normalisation, as it is initialised."""
    dataset = load("digits")
    built = Restless(dataset.image_shape, 10, rngs=nnx.Rngs(0))
    built.dropout.deterministic = True
    built.norm.use_running_average = True
    graph, params, rest = nnx.split(built, nnx.Param, ...)
    built.norm.use_running_average = False
    training, _, _ = nnx.split(built, nnx.Param, ...)
    arrays = {"params": nnx.to_pure_dict(params), "rest": nnx.to_pure_dict(rest)}

    def forward(graph):
        return lambda arrays, x: nnx.merge(
            graph, arrays["params"], arrays["rest"], copy=True
        )(x)

    return shifted_rivals.Deployed(forward(graph), forward(training), arrays, dataset)


def test_batch_norm_is_adapted(normalised):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8, 8, 1)), jnp.float32)
    answers = {}
    for name in ("none", "batch_norm"):
        method = shifted_rivals.build(name, normalised)
        answers[name] = [
            np.asarray(method.step(method.init(), scaled)[0]) for scaled in (x, 5 * x)
        ]
    # Of its own statistics the scale of a batch is no part.
    np.testing.assert_allclose(*answers["batch_norm"], atol=1e-2)
    assert np.abs(np.subtract(*answers["none"])).max() > 0.1


@pytest.mark.parametrize(("name", "resets"), [("tent", False), ("tent_reset", True)])
def test_tent_lowers_the_entropy_and_may_begin_anew(
    normalised, name, resets, monkeypatch
):
    monkeypatch.setattr(shifted_rivals, "_TENT_RESET", 3)
    method = shifted_rivals.build(name, normalised)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8, 8, 1)), jnp.float32)
    state, entropies = method.init(), []
    for _ in range(4):
        logits, state = method.step(state, x)
        logs = np.asarray(jax.nn.log_softmax(logits))
        entropies.append(-np.mean(np.sum(np.exp(logs) * logs, axis=-1)))
    assert entropies[2] < entropies[1] < entropies[0]
    assert np.isclose(entropies[3], entropies[0], rtol=1e-5) == resets


def test_what_a_model_cannot_do_is_said(capsys):
    line = fails("inference", ["shifted", "--methods", "none", "tent"], capsys)
    assert "method='tent' needs batch normalisation, model.name='mlp'" in line
    line = fails("inference", ["digits"], capsys)
    assert "PRESET='digits'; accepted are presets of a ShiftedConfig" in line
    line = fails("inference", ["shifted", "--settings", "sorted"], capsys)
    assert "settings='sorted'" in line


PRESET = """
import pathlib
from experiments.shifted_config import ShiftedConfig
def config():
    import dataclasses
    own = dataclasses.replace(ShiftedConfig().smoke(), epochs=8, steps=None)
    return dataclasses.replace(own, models=pathlib.Path({folder!r}), images=48)
"""


def test_the_command_writes_cells_and_tables(config, model, tmp_path, capsys):
    preset = tmp_path / "mine.py"
    preset.write_text(PRESET.format(folder=str(config.models)), encoding="utf-8")
    args = [str(preset), "--out", str(tmp_path / "out"), "--batches", "16"]
    inference.main([*args, "--settings", "continual", "clean"])
    shown = capsys.readouterr().out
    assert "spectral" in shown
    assert "drift: mean/angle/spectrum" in shown
    (page,) = (tmp_path / "out").glob("*-summary.json")
    rows, long = json.loads(page.read_text(encoding="utf-8"))["tables"].values()
    assert [row["method"] for row in rows] == ["none", "spectral"] * 2
    assert not long
    files = sorted({*(tmp_path / "out").glob("*.json")} - {page})
    assert len(files) == 4
    cell = json.loads(
        next(
            f for f in files if "continual" in f.name and "spectral" in f.name
        ).read_text(encoding="utf-8")
    )
    assert set(cell["shifts"]) == set(cell["drift"]) == set(cell["delays"])
    assert 0 <= cell["adapted"] <= cell["alarms"] <= 1
    before = [file.stat().st_mtime_ns for file in files]
    inference.main([*args, "--settings", "continual", "clean"])
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_task_is_one_step_and_a_stream(config, model):
    task = config.make()
    state = task.init(config)
    state, report = task.step(state, config, 0)
    assert float(report["loss"]) == 0
    found = task.evaluate(state, "test", dataclasses.replace(config, method="none"))
    assert 0 < found["accuracy"] < 1
    assert task.length(config) == (1, 1)


def test_bounds_of_windows_hold_for_all_of_them_at_once(monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 100)
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(200):
        change = rng.choice([-1.0, 0.0, 1.0], size=(3, 1050))  # 0 in the mean
        means, bounds = inference.in_windows(change)
        assert len(means) == len(bounds) == 10
        misses += max(bounds) > 0
    assert misses <= 8  # 2 are expected
    np.testing.assert_allclose(means[0], change[:, :100].mean())
    assert inference.in_windows(change[:, :50]) == ([], [])


def test_a_run_of_one_step_has_a_model_that_was_trained_whole(config, model):
    run = dataclasses.replace(config, steps=1)  # as tables ask for it
    assert run.training() == config.training()
    same = shifted.deployed(run)
    for ours, theirs in zip(
        jax.tree.leaves(same.arrays), jax.tree.leaves(model.arrays), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
