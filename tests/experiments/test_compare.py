"""Comparisons of optimizers on digits: equal budgets, rates chosen on validation."""

import json

import numpy as np
import pytest

from experiments import compare
from experiments.config import ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender
from experiments.study.cells import Spec, Store
from experiments.tasks.images import ImageTask
from tests.experiments.small_runs import SMALL


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on digits, and the parts that were read, in order."""
    out = tmp_path_factory.mktemp("runs")
    read, evaluate = [], ImageTask.evaluate

    def recording(self, state, part, config):
        read.append((part, int(state.step)))
        return evaluate(self, state, part, config)

    args = [*SMALL, "--contenders", "momentum", "sam", "adam:learning_rate=0.01"]
    args += ["--seeds", "2", "--tune", "rate", "--most", "1", "--out"]
    args += [str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTask, "evaluate", recording)
        compare.main(args)
    folder = out / "compare-digits"
    result = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    return result, read, folder, args


def test_everyone_gets_the_same_evaluations(compared):
    result = compared[0]
    assert result["evaluations"] == 12
    columns = {row["contender"]: row["columns"][0] for row in result["rows"]}
    steps = {name: column["steps"] for name, column in columns.items()}
    assert steps == {"momentum": 12, "sam": 6, "adam:learning_rate=0.01": 12}
    assert all(len(column["values"]) == 2 for column in columns.values())


def test_the_test_split_is_read_at_the_end_of_whole_runs_only(compared):
    result, read, folder, _ = compared
    assert {step for part, step in read if part == "test"} == {12, 6}
    assert all(
        trial["steps"] in (4, 2) for t in result["trials"].values() for trial in t
    )
    # The settings that lost at full length besides those in the table.
    assert [part for part, _ in read].count("test") == 3 * 2 * 2
    assert (folder / "report.html").read_text(encoding="utf-8").count("<svg") == 1


def test_a_comparison_goes_on_where_it_was(compared, monkeypatch, capsys):
    result, _, folder, args = compared
    monkeypatch.setattr(Store, "_compute", lambda *a: pytest.fail("computed again"))
    compare.main(args)
    again = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert again["rows"] == result["rows"]
    text = capsys.readouterr().out
    assert "momentum" in text
    assert "adam:learning_rate=0.01" in text


def test_a_comparison_that_is_not_tuned_says_so(tmp_path, capsys):
    args = ["--contenders", "sgd", "--seeds", "1", "--epochs", "1", "--name", "one"]
    compare.main([*SMALL, *args, "--out", str(tmp_path)])
    assert "Nothing was tuned here" in capsys.readouterr().out


def config(optimizer, **options):
    return ImageConfig(
        model=ModelConfig("mlp", {"hidden": (8,)}),
        optimizer=Contender.parse(optimizer),
        probe=ProbeConfig(40, rank=4, hessian_steps=2),
        batch_size=256,
        steps=5,
        **options,
    )


def test_seeds_rates_and_lengths_share_one_compilation(tmp_path):
    store = Store(tmp_path)
    runs = [
        config("adam:learning_rate=0.001"),
        config("adam:learning_rate=0.01"),
        config("adam:learning_rate=0.01", seed=1),
    ]
    cells = store.run([Spec(one, test=False) for one in runs])
    assert len({cell.validation["loss"] for cell in cells}) == 3
    (task,) = store._tasks.values()
    assert task._step._cache_size() == 1


def test_a_diverged_run_counts_at_chance(tmp_path):
    (found,) = Store(tmp_path).run([Spec(config("sgd:learning_rate=1e30"))])
    assert "at step 2" in found.diverged
    assert found.test["accuracy"] == pytest.approx(0.1)
    assert found.test["loss"] == pytest.approx(np.log(10))


def test_sharpness_is_measured_with_the_test(tmp_path):
    (found,) = Store(tmp_path).run([Spec(config("sgd", sharpness=True))])
    assert 0 < found.test["hessian"] < 1000
    assert 0 < found.test["trace"] < 1000


def test_cells_know_their_config_and_not_where_data_lie(tmp_path):
    (found,) = Store(tmp_path).run([Spec(config("sgd"))])
    assert "data_dir" not in found.config["data"]
    assert found.config["optimizer"]["name"] == "sgd"
