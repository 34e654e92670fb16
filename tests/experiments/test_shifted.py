"""Methods of test-time adaptation in one harness, and its command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import inference, shifted_rivals, shifted_summary
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
    tables = json.loads(page.read_text(encoding="utf-8"))["tables"]
    rows, long, noticed = tables.values()
    assert [row["method"] for row in rows] == ["none", "spectral"] * 2
    assert not long
    assert [row["stream"] for row in noticed] == ["clean"]
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
    monkeypatch.setattr(shifted_summary, "WINDOW", 100)
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(200):
        change = rng.choice([-1.0, 0.0, 1.0], size=(3, 1050))  # 0 in the mean
        means, bounds = shifted_summary.in_windows(change)
        assert len(means) == len(bounds) == 10
        misses += max(bounds) > 0
    assert misses <= 8  # 2 are expected
    np.testing.assert_allclose(means[0], change[:, :100].mean())
    assert shifted_summary.in_windows(change[:, :50]) == ([], [])


def test_a_run_of_one_step_has_a_model_that_was_trained_whole(config, model):
    run = dataclasses.replace(config, steps=1)  # as tables ask for it
    assert run.training() == config.training()
    same = shifted.deployed(run)
    for ours, theirs in zip(
        jax.tree.leaves(same.arrays), jax.tree.leaves(model.arrays), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_other_cells_in_the_folder_are_not_taken_for_ones_own(
    config, model, tmp_path, capsys
):
    preset = tmp_path / "mine.py"
    preset.write_text(PRESET.format(folder=str(config.models)), encoding="utf-8")
    args = [str(preset), "--out", str(tmp_path / "out"), "--methods", "none"]
    inference.main([*args, "--stream-batch", "16"])  # the batches by default
    capsys.readouterr()
    assert [f.name for f in (tmp_path / "out").glob("*-none-*.json")] == [
        "mine-continual-5-16-48-1-none-0.json"
    ]
    line = fails(
        "inference", [*args, "--stream-batch", "16", "--batch-size", "7"], capsys
    )
    assert "mine-continual-5-16-48-1-none-0.json of another configuration" in line


@pytest.mark.slow
def test_a_batch_is_timed_after_others_of_a_small_set_too(
    config, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(inference, "_TIMED", 2)
    preset = tmp_path / "mine.py"
    preset.write_text(PRESET.format(folder=str(config.models)), encoding="utf-8")
    out = tmp_path / "out"
    args = ["--out", str(out), "--method", "none", "--setting", "clean", "--cost"]
    inference.main([str(preset), *args])
    capsys.readouterr()
    cost = json.loads((out / "mine-cost-0.json").read_text(encoding="utf-8"))
    assert cost["clean"]["ratio"] > 0
    assert len([*out.glob("*-none-*.json")]) == 1  # once, though it is named twice


def write_cell(folder, seed, method, **values):
    config = {
        "setting": "reset",
        "stream_batch": 4,
        "severity": 5,
        "images": 20,
        "repeats": 1,
        "method": method,
        "seed": seed,
    }
    config |= {name: values.pop(name) for name in [*config] if name in values}
    stream = (config[name] for name in config)
    name = "-".join(map(str, ("mine", *stream)))
    cell = {"config": config, "images": 40, "accuracy": 0.5, "commit": "", **values}
    (folder / f"{name}.json").write_text(json.dumps(cell), encoding="utf-8")


def test_alarms_are_counted_and_their_delay_is_a_median(tmp_path):
    for seed, late in enumerate((8, None)):
        delays = {"fog": 4, "snow": late}
        write_cell(tmp_path, seed, "none")
        write_cell(tmp_path, seed, "spectral", alarms=0.5, delays=delays)
        delays = {"clean": 4}
        write_cell(
            tmp_path, seed, "spectral", setting="clean", alarms=0.25, delays=delays
        )
    clean, shifted_rows = shifted_summary.alarms(shifted_summary.read("mine", tmp_path))
    assert (clean["stream"], clean["alarms"], clean["shifts noticed"]) == (
        "clean",
        0.25,
        "",
    )
    assert (shifted_rows["shifts noticed"], shifted_rows["of"]) == (3, 4)
    assert shifted_rows["median images until then"] == 6  # of 4, 4, 8 and all 20
    assert shifted_rows["seeds"] == 2


def test_gains_are_paired_by_seed_and_streams(tmp_path):
    for seed, gain in enumerate((0.1, 0.2, 0.3)):
        write_cell(tmp_path, seed, "none", accuracy=0.5 + 0.1 * seed)
        write_cell(tmp_path, seed, "spectral", accuracy=0.5 + 0.1 * seed + gain)
    write_cell(tmp_path, 3, "spectral", accuracy=0.9)  # without its pair
    rows = shifted_summary.accuracies(shifted_summary.read("mine", tmp_path))
    ours = next(row for row in rows if row["method"] == "spectral")
    assert ours["seeds"] == 3
    np.testing.assert_allclose(ours["gain"], 20)
    assert ours["low"] < 20 < ours["high"]
