"""The report of a run."""

import re
import xml.etree.ElementTree as ET

import pytest

from experiments import report, runs
from experiments.config import Config


def record(epoch, probe):
    layers = {
        name: {
            "values": [3.0 / (epoch + 1), 1.0, 0.0],
            "captured": 0.9,
            "drift": None if epoch == 0 else 0.1,
            "angle": None if epoch == 0 else 5.0,
        }
        for name in ("layers/0/kernel", "head/kernel")
    }
    scores = {"loss": 1.0 / (epoch + 1), "accuracy": 0.5}
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "seconds": 1.5 * epoch,
        "train": scores if epoch else None,
        "validation": scores,
        "bases": {"head/kernel": {"captured": 0.8, "failures": 3}} if probe else {},
        "probe": {"layers": layers, "hessian": 12.5} if probe else None,
    }


def make_run(tmp_path, *, probe=True, epochs=3):
    run = runs.start(tmp_path, "a <run>", "digits", Config(), overwrite=False)
    for epoch in range(epochs):
        run.log(record(epoch, probe))
    return run


@pytest.mark.parametrize(("probe", "plots"), [(True, 5), (False, 1)])
def test_a_report_is_one_file_with_its_plots_inside(tmp_path, probe, plots):
    run = make_run(tmp_path, probe=probe)
    run.log({"epoch": 2, "step": 20, "test": {"loss": 0.3, "accuracy": 0.9876}})
    report.write_report(run)
    text = (run.path / "report.html").read_text()
    assert text.count("<svg") == plots
    assert "98.76%" in text
    assert "<script" not in text
    assert "a &lt;run&gt;" in text
    assert "a <run>" not in text
    # Nothing is fetched: references are into the page, names are XML's.
    for reference in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert reference.startswith("#")
    if probe:
        assert "top Hessian eigenvalue" in text
        assert "layers/0/kernel" in text
        assert "90.0%" in text
        assert "refreshes that failed" in text


def test_a_report_of_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path, epochs=1)
    report.write_report(run)
    assert "test accuracy" not in (run.path / "report.html").read_text()


def test_plots_are_well_formed_and_the_same_each_time():
    draw = lambda axis: axis.plot([1, 2], label="x")
    figures = [report.figure([draw, draw, draw]) for _ in range(2)]
    assert figures[0] == figures[1]
    ET.fromstring(figures[0])


def test_many_layers_are_thinned_out():
    assert report._spread(3, 12) == [0, 1, 2]
    spread = report._spread(50, 12)
    assert len(spread) == 12
    assert (spread[0], spread[-1]) == (0, 49)
