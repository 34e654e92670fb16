"""Few-shot runs from the command line, their report, and the comparison."""

import dataclasses
import functools
import itertools
import json
import math
import types

import jax
import numpy as np
import optax
import pytest

from dsbp_jax import meta
from experiments import cli, runs
from experiments.config import to_json
from experiments.fewshot import __main__ as fewshot, cells, compare, training
from experiments.fewshot.config import METHODS, FewshotConfig
from tests.experiments import fewshot_sets
from tests.experiments.small_runs import records

SMALL = [
    *("--outer.steps", "4"),
    *("--outer.tasks", "3"),
    *("--model.options", "hidden=8,"),
    *("--spectral.rank", "3"),
    *("--spectral.refresh-every", "2"),
    *("--inner.steps", "2"),
    *("--eval-every", "2"),
    *("--eval-episodes", "6"),
    *("--test-episodes", "8"),
]


@pytest.fixture(scope="module", autouse=True)
def shared_learners():
    """Compiled steps are shared by the runs of this file; they hold no state."""
    make, made = training.make_learner, {}

    def make_once(config):
        key = repr(config)
        if key not in made:
            made[key] = make(config)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_learner", make_once)
        yield


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_reports(method, tmp_path, capsys):
    fewshot.main([*SMALL, "--method", method, "--out", str(tmp_path)])
    folder = tmp_path / f"sine-10shot-{method}-seed0"
    validations, test = records(folder)[:-1], records(folder)[-1]
    assert [record["step"] for record in validations] == [0, 2, 4]
    losses = test["test"]["loss"]
    steps = 50 if method == "reptile" else 5
    assert len(losses["curve"]) == steps + 1
    assert losses["curve"][-1] == pytest.approx(losses["mean"])
    assert losses["ci95"] > 0
    carried = method.startswith("spectral_")
    assert bool(validations[-1]["bases"]) == carried
    report = (folder / "report.html").read_text()
    assert ("Learned bases" in report) == carried
    assert "Adaptation" in report
    assert method in capsys.readouterr().out


def test_a_basis_is_refreshed_in_its_period(tmp_path):
    args = ["--method", "spectral_maml", "--out", str(tmp_path)]
    fewshot.main([*SMALL, *args])
    counts = [
        {basis["refreshes"] for basis in record["bases"].values()}
        for record in records(tmp_path / "sine-10shot-spectral_maml-seed0")[:-1]
    ]
    assert counts == [{0}, {1}, {2}]


def test_bases_of_each_task(tmp_path):
    args = ["--method", "spectral_fomaml", "--spectral.basis", "task"]
    fewshot.main([*SMALL, *args, "--out", str(tmp_path)])
    folder = tmp_path / "sine-10shot-spectral_fomaml-seed0"
    assert all(not record["bases"] for record in records(folder)[:-1])
    assert math.isfinite(records(folder)[-1]["test"]["loss"]["mean"])


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_resumed_run_ends_the_same(tmp_path, monkeypatch):
    args = [*SMALL, "--method", "spectral_maml"]  # with learned rates, as the preset
    fewshot.main([*args, "--out", str(tmp_path / "whole")])
    log = runs.Run.log

    def kill(self, record):
        if record["step"] == 4:
            raise Killed
        log(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", kill)
        with pytest.raises(Killed):
            fewshot.main([*args, "--out", str(tmp_path / "cut")])
    fewshot.main([*args, "--out", str(tmp_path / "cut"), "--resume"])
    name = "sine-10shot-spectral_maml-seed0"
    without_time = lambda folder: [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in records(folder / name)
    ]
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")


def test_training_stops_after_its_minutes(tmp_path):
    args = ["--outer.minutes", "1e-6", "--out", str(tmp_path)]
    fewshot.main([*SMALL, *args])
    assert records(tmp_path / "sine-10shot-maml-seed0")[-1]["step"] == 1


def test_a_diverged_run_says_at_which_step(tmp_path, capsys):
    args = ["--inner.learning-rate", "1e12", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        fewshot.main([*SMALL, *args])
    assert exit_.value.code == 1
    message = capsys.readouterr().err
    assert "after outer step 0; try a lower inner.learning_rate than 1e+12" in message


def test_a_diverged_step_is_named():
    learner = training.make_learner(cli.parse(fewshot.Fewshot, SMALL, "p").config)
    state = learner.init(0)
    rates = jax.tree.map(lambda rate: rate * np.nan, state.params.rates)
    broken = state.params._replace(rates=rates)
    with pytest.raises(
        training.Diverged, match="the meta-loss is nan at outer step 1;"
    ):
        training.train(learner, state._replace(params=broken), until=2, seed=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "mmaml"], "method='mmaml'; accepted are maml, fomaml"),
        (["--inner.steps", "0"], "inner.steps=0; accepted are values of 1 or more"),
        (["--outer.task-axis", "0"], "outer.task_axis='0'; accepted are auto"),
        (["omniglott"], "PRESET='omniglott'; accepted are cifar_fs, omniglot, sine"),
        (["omniglot"], "data_dir=None"),
        (["--spectral.basis", "own"], "spectral.basis='own'; accepted are carried"),
        (
            ["omniglot", "--method", "reptile", "--ways", "20"],
            "reptile.batch_size=10; accepted are multiples of ways=20",
        ),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        fewshot.main([*args, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", cli.preset_names(fewshot.Fewshot.presets))
def test_presets(name):
    folder = fewshot.Fewshot.presets
    assert isinstance(cli.load_preset(name, folder), FewshotConfig)
    text = (folder / f"{name}.py").read_text()
    assert f"python -m experiments.fewshot {name}" in text
    assert "test tasks" in text.split('"""')[1]  # and the figure that it reached


def test_compare_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells, "FIRST_TEST", 2)
    ticks = itertools.count(step=1e-3)  # seconds: a look at the clock takes one
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(training, "time", clock)
    args = ["sine", *SMALL, "--methods", "maml", "fomaml", "--seeds", "2"]
    args += ["--minutes", "2e-4", "--tune-minutes", "1e-4", "--out", str(tmp_path)]
    args += ["--inner-rates", "1e-3", "1e12"]
    compare.main(args)
    folder = tmp_path / "fewshot-sine"
    result = json.loads((folder / "comparison.json").read_text())
    assert result["equal_steps"] >= 2
    assert [row["method"] for row in result["table"]] == ["maml", "fomaml"]
    # The rate that diverges was not chosen.
    assert {row["inner"] for row in result["table"]} == {"0.001 *"}
    assert all(len(group) == 2 for group in result["cells"].values())
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*min*.json")}
    assert len(files) == 2 * (2 + 2)
    capsys.readouterr()
    compare.main(args)
    assert files == {path: path.stat().st_mtime_ns for path in files}
    captured = capsys.readouterr().out
    assert "fomaml, seed 1: " in captured
    assert "The inner rate is the best of 0.001, 1e+12 on 6 validation" in captured
    assert "Loss, lower is better" in captured
    compare.main([*args, "--outer.steps", "9", "--eval-every", "7"])  # have no part
    capsys.readouterr()
    with pytest.raises(SystemExit):
        compare.main([*args, "--test-episodes", "7"])
    message = "test_episodes=7; the run was started with 8: accepted are that value, or"
    assert f"{message} another --name" in capsys.readouterr().err
    monkeypatch.setattr(runs, "environment", lambda: {"jax": "0"})
    with pytest.raises(SystemExit):
        compare.main(args)
    assert "ran on {" in capsys.readouterr().err


def test_rates_are_tuned_one_after_the_other(tmp_path, monkeypatch):
    merit = lambda config: (
        -abs(config.inner.learning_rate - 0.2) - abs(config.outer.learning_rate - 0.03)
    )
    seen = []

    def train_cell(folder, config, minutes, *, test):
        assert not test
        seen.append((config.inner.learning_rate, config.outer.learning_rate))
        return types.SimpleNamespace(merit=merit(config))

    monkeypatch.setattr(compare, "train_cell", train_cell)
    chosen = lambda **grids: compare.tuned(compare.Compare(**grids), tmp_path, "anil")
    config = chosen(inner_rates=(0.1, 0.2, 0.3), outer_rates=(0.01, 0.03))
    assert (config.inner.learning_rate, config.outer.learning_rate) == (0.2, 0.03)
    start = FewshotConfig().outer.learning_rate
    assert seen == [
        *((rate, start) for rate in (0.1, 0.2, 0.3)),
        (0.2, 0.01),
        (0.2, 0.03),
    ]
    # A grid of one rate is that rate, untried.
    assert chosen(inner_rates=(0.5,)).inner.learning_rate == 0.5
    assert len(seen) == 5
    # And it holds while the other is tuned.
    chosen(inner_rates=(0.1, 0.2), outer_rates=(0.07,))
    assert seen[5:] == [(0.1, 0.07), (0.2, 0.07)]


def test_a_cell_that_fails_on_its_test_tasks_diverged(tmp_path):
    config = cli.parse(
        fewshot.Fewshot, [*SMALL, "--inner.test-steps", "80"], "p"
    ).config
    inner = dataclasses.replace(config.inner, learning_rate=1.0)
    config = dataclasses.replace(config, inner=inner)
    cell = cells.train_cell(tmp_path, config, 1e-6)
    assert cell.diverged == "the test loss is not finite at step 1"
    assert cell.last is None
    assert cells.train_cell(tmp_path, config, 1e-6) == cell


def test_test_tasks_go_with_the_seed(tmp_path, monkeypatch):
    seen = set()
    evaluate = training.Learner.evaluate

    def note(self, state, **drawn):
        seen.add((drawn["part"], drawn.get("seed", 0)))
        return evaluate(self, state, **drawn)

    monkeypatch.setattr(training.Learner, "evaluate", note)
    config = cli.parse(fewshot.Fewshot, [*SMALL, "--seed", "3"], "p").config
    cells.train_cell(tmp_path, config, 1e-6)
    cells.train_cell(tmp_path, config, 1e-6, test=False)
    assert seen == {("test", 3), ("validation", 0)}


def made_cell(tests, last, diverged=None):
    loss = lambda value: {"loss": {"mean": value}}
    measured = {str(step): loss(value) for step, value in tests.items()}
    config = to_json(FewshotConfig())
    end = None if diverged else loss(last)
    return cells.Cell(config, {}, 10, 2.0, measured, end, diverged)


def test_a_diverged_cell_is_left_out():
    command = compare.Compare(methods=("maml", "anil"), seeds=3)
    found = {
        "maml": [made_cell({2: 5, 4: 3}, v) for v in (1.0, 2.0, 3.0)],
        "anil": [
            made_cell({2: 6, 4: 4}, 4.0),
            made_cell({}, 0, "at step 1"),
            made_cell({2: 8}, 5.0),
        ],
    }
    assert compare.common_steps(found) == 2
    maml, anil = (compare.table_row(command, found, name, 2) for name in found)
    assert maml["after 10 min"] == "2 ± 0.58"
    assert maml["difference after 10 min"] == maml["diverged"] == ""
    assert anil["after 2 steps"] == "7 ± 1"
    assert anil["after 10 min"] == "4.5 ± 0.5"
    assert anil["difference after 10 min"] == "+2.5 ± 0.5 (p 0.13)"
    assert anil["ms a step"] == "200.0"
    assert anil["diverged"] == "1"
    assert found["anil"][1].merit == made_cell({}, math.nan).merit == -math.inf
    assert found["anil"][0].merit == -4.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--methods", "maml", "maml"],
            "methods='maml maml'; accepted are one or more",
        ),
        (["--methods", "mml"], "methods='mml'; accepted are maml"),
        (["--outer-rates", "0"], "outer_rates=0.0; accepted are positive numbers"),
        (
            ["--data.name", "omniglot", "--ways", "20"],
            "reptile.batch_size=10; accepted are multiples of ways=20",
        ),
    ],
)
def test_bad_comparisons(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["sine", *args])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_images_end_to_end(tmp_path, capsys):
    """Classification by the network with batch statistics, on bases of its layers."""
    fewshot_sets.Drawings(data_dir=tmp_path).download_and_prepare()
    args = ["omniglot", "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs")]
    args += [*SMALL, "--model.options", "channels=4", "--ways", "3"]
    args += ["--spectral.source", "activation", "--spectral.side", "input"]
    fewshot.main([*args, "--method", "spectral_fomaml", "--inner.steps", "1"])
    folder = tmp_path / "runs" / "omniglot-3way-1shot-spectral_fomaml-seed0"
    *validations, last = records(folder)
    assert 0 <= last["test"]["accuracy"]["mean"] <= 1
    assert len(last["test"]["accuracy"]["curve"]) == 4
    bases = validations[-1]["bases"]
    assert sorted(bases) == [*(f"convs/{i}/kernel" for i in (1, 2, 3)), "head/kernel"]
    assert "% accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fewshot.main([*args, "--ways", "11"])
    assert "ways=11; accepted are 2 to 10, the classes for validation" in (
        capsys.readouterr().err
    )


def test_reptile_trains_on_tasks_of_its_own_and_is_tested_alike():
    args = [*SMALL, "--method", "reptile", "--reptile.train-shots", "25"]
    learner = training.make_learner(cli.parse(fewshot.Fewshot, args, "p").config)
    points = lambda episodes: episodes.draw("train", 2, seed=0, step=0)["x"].shape[1]
    assert learner.draw(0, 0)["x"].shape[:2] == (learner.config.tasks, 25) == (5, 25)
    assert points(learner.training_episodes) == 25
    assert points(learner.episodes) == 20


def test_tasks_are_split_over_the_devices(monkeypatch):
    args = [*SMALL, "--method", "spectral_maml", "--outer.tasks", "16"]
    args += ["--spectral.rank", "2"]  # a third goes by how sums are ordered
    config = cli.parse(fewshot.Fewshot, args, "p").config

    def run():
        learner = training.Learner(config, None)
        state = learner.init(0)
        given = (state, learner.arrays, learner.draw(0, 0), True)
        flops = learner._step.lower(*given).compile().cost_analysis()["flops"]
        for step in range(3):
            state, _ = learner.step(state, learner.draw(0, step), step)
        return flops, state.params, learner.evaluate(state, "test", 16)

    part, *split = run()
    assert jax.local_device_count() == 8
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    whole, *expected = run()
    assert part < 0.3 * whole  # refreshes are done by each
    # Three steps of Adam divide what rounding left by its own size.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5)
    jax.tree.map(close, split, expected)


@pytest.mark.parametrize(
    ("method", "build"),
    [
        ("maml", functools.partial(meta.maml, num_steps=2)),
        ("fomaml", functools.partial(meta.maml, num_steps=2, first_order=True)),
        ("anil", functools.partial(meta.anil, num_steps=2, head="head")),
        ("reptile", functools.partial(meta.reptile, num_steps=5, batch_size=10)),
    ],
)
def test_methods_are_what_they_are_called(method, build):
    args = [*SMALL, "--method", method, "--inner.no-learned-rates"]
    config = cli.parse(fewshot.Fewshot, args, "p").config
    learner = training.make_learner(config)
    expected = build(learner.loss, optax.sgd(config.inner.learning_rate))
    params = learner.init(0).params
    tasks = learner.training_episodes.build((), learner.draw(0, 0))
    gradients = [
        jax.jit(jax.grad(one.meta_loss))(params, tasks)
        for one in (learner.training, expected)
    ]
    for mine, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
