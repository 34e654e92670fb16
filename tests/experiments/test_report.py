"""The report of a run."""

import re
import types
import xml.etree.ElementTree as ET

import pytest

from experiments.config import ImageConfig
from experiments.study import report, runs
from experiments.study.task import Metric

TASK = types.SimpleNamespace(
    metrics={
        "accuracy": Metric("%", 0.1, 100.0, True, 2, True),
        "loss": Metric("nats", 2.3),
    }
)


def record(step, probe, captured=0.9):
    layers = {
        name: {
            "values": [3.0 / (step + 1), 1.0, 0.0],
            "captured": captured,
            "drift": None if step == 0 else 0.1,
            "angle": None if step == 0 else 5.0,
        }
        for name in ("layers/0/kernel", "head/kernel")
    }
    scores = {"loss": 1.0 / (step + 1), "accuracy": 0.5}
    return {
        "step": step,
        "seconds": 1.5 * step,
        "looks": [],
        "train": scores if step else None,
        "validation": scores,
        "bases": {"head/kernel": {"captured": 0.8, "failures": 3}} if probe else {},
        "probe": {"layers": layers, "hessian": 12.5} if probe else None,
    }


def make_run(tmp_path, *, probe=True, steps=3, **options):
    run = runs.start(tmp_path, "a <run>", "digits", ImageConfig(), overwrite=False)
    for step in range(steps):
        run.log(record(step, probe, **options))
    return run


@pytest.mark.parametrize(("probe", "plots"), [(True, 5), (False, 1)])
def test_a_report_is_one_file_with_its_plots_inside(tmp_path, probe, plots):
    run = make_run(tmp_path, probe=probe)
    run.log({"step": 20, "test": {"loss": 0.3, "accuracy": 0.9876}, "finished": True})
    report.write(run, TASK)
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == plots
    assert "98.76 %" in text
    assert "<script" not in text
    assert "a &lt;run&gt;" in text
    assert "a <run>" not in text
    # Every axis of a metric says its unit.
    assert "accuracy, %" in text
    assert "loss, nats" in text
    # Nothing is fetched: references are into the page, names are XML's.
    for reference in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert reference.startswith("#")
    if probe:
        assert "top Hessian eigenvalue" in text
        assert "layers/0/kernel" in text
        assert "90.0%" in text
        assert "refreshes that failed" in text


def test_a_report_of_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path, steps=1)
    report.write(run, TASK)
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "test accuracy" not in text


def test_shares_are_drawn_on_an_axis_of_all_of_one():
    """So that what is constant but for its rounding looks constant."""
    seen = [(step, {"w": {"captured": 1 - 1e-7 * step}}) for step in range(3)]
    limits = []

    def draw(axis):
        report._shares(seen, "captured")(axis)
        limits.append(axis.get_ylim())

    report.figure([draw])
    assert limits == [(-0.02, 1.02)]


def test_plots_are_well_formed_and_the_same_each_time():
    draw = lambda axis: axis.plot([1, 2], label="x")
    figures = [report.figure([draw, draw, draw]) for _ in range(2)]
    assert figures[0] == figures[1]
    ET.fromstring(figures[0])


def test_many_layers_are_thinned_out():
    assert report.spread(3, 12) == [0, 1, 2]
    spread = report.spread(50, 12)
    assert len(spread) == 12
    assert (spread[0], spread[-1]) == (0, 49)
