"""The report of a few-shot run: one HTML file, and a closing table."""

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from experiments.fewshot.config import SINE
from experiments.report import (
    figure,
    html_table,
    names_and_values,
    section,
    write_page,
)
from experiments.runs import Run


def write_report(run: Run) -> None:
    """Writes `report.html` from the metrics of a run.

    Args:
      run: A run with at least one validation.
    """
    records = [record for record in run.records() if "validation" in record]
    metrics = list(records[0]["validation"])
    body = [
        html_table(["", "value"], summary(run)),
        section(
            "Training",
            "On validation tasks after the last inner step, over outer steps; the band "
            "is a 95 % confidence interval of the mean.",
            figure([_over_steps(records, metric) for metric in metrics]),
        ),
        section(
            "Adaptation",
            "Means over validation tasks after each inner step, one line a validation, "
            "from dark (first) to bright (last).",
            figure([_curves(records, metric) for metric in metrics]),
        ),
    ]
    if records[-1]["bases"]:
        body += _bases_sections(records)
    write_page(run, body)


def summary(run: Run) -> list[tuple[str, str]]:
    """The closing numbers of a run: names and values."""
    records = [record for record in run.records() if "validation" in record]
    last, config = records[-1], run.config
    rows = [
        ("tasks", task_name(config)),
        ("method", config.method),
        ("model", config.model.name),
        ("outer steps", f"{last['step']}, {config.tasks} tasks each"),
        ("training time", f"{last['seconds']:.1f} s"),
        ("validation", score(last["validation"])),
    ]
    if result := run.result():
        rows.append((f"test, {config.test_episodes} tasks", score(result["test"])))
        curve = result["test"][_metric(result["test"])]["curve"]
        shown = " → ".join(f"{value:.4g}" for value in curve)
        rows.append((f"test, before and after each of {len(curve) - 1} steps", shown))
    if failures := sum(basis["failures"] for basis in last["bases"].values()):
        rows.append(("refreshes that failed", str(failures)))
    return rows


def task_name(config: Any) -> str:
    """What the tasks are, in words."""
    if config.data.name == SINE:
        return f"{config.data.name}, {config.shots} points"
    return f"{config.data.name}, {config.ways} ways, {config.shots} shots"


def score(measured: dict[str, Any]) -> str:
    """The number to report, with its confidence.

    Example:
      >>> score({"loss": {"mean": 0.1, "ci95": 0.02}})
      '0.1000 ± 0.0200 (squared error)'
      >>> score({"accuracy": {"mean": 0.9, "ci95": 0.01}})
      '90.00 ± 1.00 % accuracy'
    """
    value = measured[_metric(measured)]
    if "accuracy" in measured:
        return f"{100 * value['mean']:.2f} ± {100 * value['ci95']:.2f} % accuracy"
    return f"{value['mean']:.4f} ± {value['ci95']:.4f} (squared error)"


def _metric(measured: dict[str, Any]) -> str:
    return "accuracy" if "accuracy" in measured else "loss"


def closing_table(run: Run) -> Table:
    """The summary as a table for the terminal."""
    return names_and_values(str(run.path), summary(run))


def _over_steps(records: list[dict[str, Any]], metric: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        steps = [record["step"] for record in records]
        found = [record["validation"][metric] for record in records]
        means, errors = (
            np.array([value[key] for value in found]) for key in ("mean", "ci95")
        )
        axis.plot(steps, means, marker=".")
        axis.fill_between(steps, means - errors, means + errors, alpha=0.2)
        axis.set(xlabel="outer step", ylabel=metric)
        if metric == "loss":
            axis.set_yscale("log")

    return draw


def _curves(records: list[dict[str, Any]], metric: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for record, color in zip(records, _shades(len(records)), strict=True):
            axis.plot(record["validation"][metric]["curve"], color=color, marker=".")
        axis.set(xlabel="inner step", ylabel=metric)
        if metric == "loss":
            axis.set_yscale("log")

    return draw


def _shades(number: int) -> np.ndarray:
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, number))


def _bases_sections(records: list[dict[str, Any]]) -> list[str]:
    """The bases that are carried over tasks."""
    records = [record for record in records if record["step"]]
    layers = list(records[0]["bases"]) if records else []
    if not layers:
        return []
    over = lambda key, label: lambda axis: _lines(axis, records, layers, key, label)
    return [
        section(
            "Learned bases",
            "Eigenvalues of the bases that all tasks share, one line a validation, "
            "from dark (first) to bright (last).",
            figure([_spectrum(records, layer) for layer in layers], columns=3),
        ),
        section(
            "Captured energy and drift",
            "Left: the share of the trace that each basis holds. Right: mean squared "
            "sine of the angles between its last two refreshes.",
            figure([over("captured", "captured energy"), over("drift", "drift")]),
        ),
    ]


def _spectrum(records: list[dict[str, Any]], layer: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for record, color in zip(records, _shades(len(records)), strict=True):
            values = np.array(record["bases"][layer]["values"])
            values = np.where(values > 1e-9 * values.max(), values, np.nan)
            axis.plot(np.arange(1, len(values) + 1), values, color=color, lw=1)
        axis.set(title=layer, xlabel="index", ylabel="eigenvalue", yscale="log")

    return draw


def _lines(
    axis: Axes, records: list[dict[str, Any]], layers: list[str], key: str, label: str
) -> None:
    steps = [record["step"] for record in records]
    for layer in layers:
        values = [record["bases"][layer][key] for record in records]
        axis.plot(steps, values, marker=".", label=layer)
    axis.set(xlabel="outer step", ylabel=label)
    axis.legend(fontsize=8)
