"""Few-shot runs from the command line, their report, and the comparison."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import cli, runs
from experiments.fewshot import __main__ as fewshot, compare, training
from experiments.fewshot.config import METHODS, FewshotConfig
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
    assert len(losses["curve"]) == 6  # the start and five steps
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
    assert records(tmp_path / "sine-10shot-maml-seed0")[-1]["step"] == 2


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
    assert (
        f"python -m experiments.fewshot {name}" in (folder / f"{name}.py").read_text()
    )


def test_compare_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "FIRST_TEST", 2)
    args = ["sine", *SMALL, "--methods", "maml", "fomaml", "--seeds", "2"]
    args += ["--minutes", "2e-4", "--tune-minutes", "1e-4", "--out", str(tmp_path)]
    args += ["--inner-rates", "1e-3", "1e12"]
    compare.main(args)
    folder = tmp_path / "fewshot-compare"
    result = json.loads((folder / "comparison.json").read_text())
    assert result["equal_steps"] >= 2
    assert [row["method"] for row in result["table"]] == ["maml", "fomaml"]
    # The rate that diverges was not chosen.
    assert {row["inner rate"] for row in result["table"]} == {"0.001"}
    assert all(len(cells) == 2 for cells in result["cells"].values())
    cells = {path: path.stat().st_mtime_ns for path in folder.glob("*min*.json")}
    assert len(cells) == 2 * (2 + 2)
    capsys.readouterr()
    compare.main(args)
    assert cells == {path: path.stat().st_mtime_ns for path in cells}
    assert "fomaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([*args, "--eval-episodes", "7"])
    assert "is of another config" in capsys.readouterr().err
