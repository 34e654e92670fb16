"""Tables of a task without a network: searches, seeds, equal time, what is shown."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.study import (
    loop,
    printing,
    report,
    rows,
    tables,
)
from experiments.study.cells import Store
from experiments.study.task import Metric
from tests.experiments.toy import ToyConfig, ToyTask

ROOT = Path(__file__).parents[2]


def table(**options):
    options = {"contenders": ("plain", "twice"), "seeds": 3} | options
    return tables.Table("A title", "A claim.", ToyConfig(), **options)


def test_a_table_is_tuned_and_paired(tmp_path):
    store = Store(tmp_path)
    result = tables.compute("toy", table(metrics=("error", "share")), store, "cpu")
    plain, twice = result["rows"]
    assert [column["metric"] for column in result["columns"]] == ["error", "share"]
    for row, steps in ((plain, 12), (twice, 6)):
        for column in row["columns"]:
            assert column["interior"]
            assert column["steps"] == steps
            assert len(column["values"]) == 3
            assert column["setting"]["rate"] == pytest.approx(0.81)
    difference = twice["columns"][0]["difference"]
    pairs = np.subtract(twice["columns"][0]["values"], plain["columns"][0]["values"])
    assert difference["mean"] == pytest.approx(pairs.mean())
    assert difference["holm"] >= difference["p"]
    assert "difference" not in plain["columns"][0]
    assert plain["columns"][1]["sampling"] > 0
    assert {trial["steps"] for trial in result["trials"]["plain"]} == {4}
    assert result["budget"]["used"] > 0
    assert json.loads(json.dumps(result)) == result
    again = tables.compute("toy", table(metrics=("error", "share")), store, "cpu")
    assert again["rows"] == result["rows"]
    whole = dataclasses.replace(table(metrics=("error", "share")), trial_length=1.0)
    trials = tables.compute("toy", whole, store, "cpu")["trials"]
    assert {trial["steps"] for trial in trials["plain"]} == {12}


def test_seeds_that_share_examples_say_less(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SLOW", 0.0)
    contenders = "plain", "plain:1.0"
    of_folds = table(
        contenders=contenders, tune=(), metrics=("error", "share"), seeds=4, margin=0.5
    )
    compute = lambda: tables.compute("toy", of_folds, Store(tmp_path))
    plain = compute()
    monkeypatch.setattr(ToyConfig, "overlap", 1e6)
    folds = compute()
    assert (plain["overlap"], folds["overlap"]) == (0, 1e6)
    assert "overlap" in printing.notes(folds)
    assert "overlap" not in printing.notes(plain)
    rows = [result["rows"][1]["columns"] for result in (plain, folds)]
    for alone, shared in zip(*rows, strict=True):
        # Slow ones have fewer seeds, but folds count together only.
        assert (len(alone["values"]), len(shared["values"])) == (3, 4)
        differences = alone["difference"], shared["difference"]
        for found, other in ((alone, shared), differences):
            assert other["high"] - other["low"] > 5 * (found["high"] - found["low"])
        assert shared["difference"]["p"] > alone["difference"]["p"]
        assert shared["difference"]["bound"] > alone["difference"]["bound"]
    beaten = [[row["beaten_by"] for row in result["rows"]] for result in (plain, folds)]
    assert beaten == [[["plain:1.0"], []], [[], []]]


def test_no_rate_is_chosen_on_test_data(tmp_path, monkeypatch):
    read = []
    evaluate = ToyTask.evaluate

    def noted(self, state, part, config):
        read.append((part, int(state.step), config.rate))
        return evaluate(self, state, part, config)

    monkeypatch.setattr(ToyTask, "evaluate", noted)
    result = tables.compute("toy", table(contenders=("plain",)), Store(tmp_path))
    tested = {rate for part, _, rate in read if part == "test"}
    assert len(tested) == 2  # the two that were run at full length
    assert {step for part, step, _ in read if part == "test"} == {12}
    assert len(result["trials"]["plain"]) > 3


def test_a_contender_without_data_is_a_row_with_its_reason(tmp_path):
    result = tables.compute(
        "toy", table(contenders=("plain", "absent"), tune=()), Store(tmp_path)
    )
    absent = result["rows"][1]
    assert absent["failed"] == "data_dir=None; accepted is a folder"
    assert "no result: data_dir=None" in printing.markdown(result)


def test_a_table_without_any_data_has_reasons_only(tmp_path):
    result = tables.compute("toy", table(contenders=("absent",)), Store(tmp_path))
    assert result["columns"] == []
    assert "no result" in printing.markdown(result)
    report.write_table(tmp_path / "t.html", result)


def clock(monkeypatch, seconds):
    """A clock by which a step of a contender takes so long."""
    now, step = [0.0], ToyTask.step

    def stepped(self, state, config, number):
        now[0] += seconds[config.name]
        return step(self, state, config, number)

    monkeypatch.setattr(ToyTask, "step", stepped)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])


def test_equal_time_is_measured(tmp_path, monkeypatch):
    clock(monkeypatch, {"plain": 1.0, "quick": 0.4})
    one = table(contenders=("plain", "quick"), views=("evaluations", "time"), tune=())
    result = tables.compute("toy", one, Store(tmp_path))
    same, timed = result["rows"][1]["columns"]
    assert (same["steps"], timed["steps"]) == (12, 30)
    assert np.mean(timed["seconds"]) == pytest.approx(12.0)
    assert timed["note"] == ""


def test_time_to_a_loss_is_that_of_a_whole_schedule(tmp_path, monkeypatch):
    clock(monkeypatch, {"plain": 1.0, "steep": 2.0, "flat": 1.0})
    one = table(
        contenders=("plain:0.1", "steep:0.3", "flat:0.01"), views=("loss",), tune=()
    )
    result = tables.compute("toy", one, Store(tmp_path))
    plain, steep, flat = (row["columns"][0] for row in result["rows"])
    assert plain["steps"] == 12
    assert steep["steps"] in (4, 5)
    assert np.mean(steep["seconds"]) == pytest.approx(2.0 * steep["steps"])
    assert np.mean(steep["validation"]) <= np.mean(plain["validation"])
    assert flat["note"] == "not reached"


def test_slow_contenders_have_fewer_seeds(tmp_path, monkeypatch):
    clock(monkeypatch, {"plain": 1.0, "slow": 3.5})
    one = table(contenders=("plain", "slow"), seeds=5, tune=())
    plain, slow = tables.compute("toy", one, Store(tmp_path))["rows"]
    assert len(plain["columns"][0]["values"]) == 5
    assert len(slow["columns"][0]["values"]) == 3
    assert "3 seeds" in printing.entry(slow["columns"][0])[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": ()}, "contenders=''; accepted are one or more"),
        ({"views": ("speed",)}, "views='speed'; accepted are evaluations, time, loss"),
        ({"tune": ("rates",)}, "tune='rates'; accepted are rate, decay"),
        ({"seeds": 0}, "seeds=0"),
        ({"minutes": -1}, "minutes=-1"),
    ],
)
def test_tables_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        table(**options)


def test_metrics_that_a_task_has_not_are_said(tmp_path):
    with pytest.raises(ValueError, match="metrics='acc'; accepted are error, share"):
        tables.compute("toy", table(metrics=("acc",)), Store(tmp_path))


def test_smoke_is_the_same_table_in_short():
    small = table(seeds=5, views=("evaluations", "time")).smoke()
    assert (small.config.steps, small.seeds, small.views) == (
        2,
        2,
        ("evaluations", "time"),
    )


def test_the_front_is_what_nothing_is_shown_to_beat():
    noise = np.array([0.0, 0.1, -0.1, 0.05, -0.05])
    points = {  # share of right answers, error, and the order of their noise
        "balanced": (90.0, 1.0, 1),
        "right": (95.0, 2.0, 1),
        "worse": (85.0, 1.0, -1),
        "a little worse": (94.98, 2.0, -1),
        "much worse in one": (90.0, 3.0, -1),
    }
    lines = [
        {
            "contender": name,
            "columns": [
                {"values": list(share + noise[::order])},
                {"values": list(error + noise[::-order])},
            ],
        }
        for name, (share, error, order) in points.items()
    ]
    lines.append({"contender": "failed", "columns": []})
    metrics = [Metric("%", 0.0, higher=True), Metric("%", 9.0)]
    rows.front(lines, metrics, 0.5)
    beaten = {line["contender"]: line.get("beaten_by") for line in lines}
    assert beaten["balanced"] == beaten["right"] == beaten["a little worse"] == []
    assert beaten["failed"] is None
    assert beaten["worse"] == ["balanced"]
    assert beaten["much worse in one"] == ["balanced", "right", "a little worse"]
