"""Reports: one HTML file with its plots inside, and closing tables."""

import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from experiments.study import printing
from experiments.study.config import to_json
from experiments.study.runs import Run, write_atomically
from experiments.study.task import Metric, Task

MAX_PANELS = 12  # layers with a plot of their own

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; color: #1d2330; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right;
       border-bottom: 1px solid #dde; }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto; } pre { background: #f5f6fa; padding: 1rem; }
p.note { color: #566; max-width: 46rem; }
"""
_PLOT_STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dsbp_jax",
}

Records = list[dict[str, Any]]


# --- pages --------------------------------------------------------------------------


def figure(panels: Iterable[Callable[[Axes], None]], *, columns: int = 2) -> str:
    """Draws panels in a grid, as inline SVG.

    Args:
      panels: Functions that draw on their axes.
      columns: Panels in a row.

    Returns:
      An `<svg>` element.
    """
    panels = list(panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_PLOT_STYLE):
        canvas = Figure(figsize=(11 * columns / max(columns, 2), 3.3 * rows))
        canvas.set_layout_engine("constrained")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axis, draw in zip(axes, panels, strict=False):
            draw(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def standalone(svg: str) -> str:
    """An inline SVG as a file of its own."""
    return '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n' + svg


def page(title: str, body: Iterable[str]) -> str:
    """A self-contained HTML page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
        f"{html.escape(title)}</title><style>{_STYLE}</style><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(body)}</body></html>\n"
    )


def section(title: str, note: str, panels: Iterable[Any], *, columns: int = 2) -> str:
    """A heading, what the plots show, and the plots."""
    drawn = figure(panels, columns=columns)
    return f'<h2>{title}</h2><p class="note">{note}</p>{drawn}'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    cells = lambda words, tag: "".join(
        f"<{tag}>{html.escape(word)}</{tag}>" for word in words
    )
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{lines}</table>"


# --- a run --------------------------------------------------------------------------


def write(run: Run, task: Task) -> None:
    """Writes `report.html` from the metrics of a run with an evaluation."""
    records = [record for record in run.records() if "validation" in record]
    body = [
        html_table(["", "value"], summary(run, task)),
        section(
            "Training",
            "Training values are means since the last evaluation, before each step; "
            "validation is measured after it, with a 95 % interval of the mean where "
            "it is over tasks.",
            [_curve(records, name, metric) for name, metric in task.metrics.items()],
        ),
    ]
    if "curve" in records[0]["validation"]:
        body.append(
            section(
                "Adaptation",
                "Means over validation tasks after each inner step, one line an "
                "evaluation, from dark (first) to bright (last).",
                [_adaptation(records, n, metric) for n, metric in task.metrics.items()],
            )
        )
    body += _bases(records) + _probes(records)
    config = json.dumps(to_json(run.config), indent=2)
    body.append(f"<h2>Configuration</h2><pre>{html.escape(config)}</pre>")
    write_atomically(run.path / "report.html", page(run.path.name, body))


def summary(run: Run, task: Task) -> list[tuple[str, str]]:
    """The closing numbers of a run: names and values."""
    records = [record for record in run.records() if "validation" in record]
    last, config = records[-1], run.config
    setting = ", ".join(f"{key} {x:g}" for key, x in config.searched().items())
    rows = [
        ("contender", config.contender),
        ("rates", setting),
        ("steps", f"{last['step']}, {last['seconds']:.1f} s"),
    ]
    if last["train"]:
        rows.append(("training loss", f"{last['train']['loss']:.4f}"))
    result = run.result() or {}
    for name, metric in task.metrics.items():
        for part in ("validation", "test"):
            if part in (result if part == "test" else last):
                measured = (result if part == "test" else last)[part]
                rows.append((f"{part} {name}", _value(measured, name, metric)))
    for name in task.metrics if "curve" in result.get("test", {}) else ():
        shown = " → ".join(f"{value:.4g}" for value in result["test"]["curve"][name])
        rows.append((f"test {name}, before and after each inner step", shown))
    probe = last.get("probe") or {}
    if "hessian" in probe:
        rows.append(("top Hessian eigenvalue", f"{probe['hessian']:.4g}"))
    if probe.get("layers"):
        captured = [layer["captured"] for layer in probe["layers"].values()]
        rows.append(("energy in the probed rank, least", f"{min(captured):.1%}"))
    if failures := sum(leaf["failures"] for leaf in last["bases"].values()):
        rows.append(("refreshes that failed", str(failures)))
    return rows


def _value(measured: dict[str, Any], name: str, metric: Metric) -> str:
    """A number with its interval, where it has one, and unit."""
    text = f"{metric.scale * measured[name]:.{metric.digits}f}"
    if "ci95" in measured:
        text += f" ± {metric.scale * measured['ci95'][name]:.{metric.digits}f}"
    return f"{text} {metric.unit}".strip()


def closing_table(run: Run, task: Task) -> Table:
    """The summary as a table for the terminal."""
    result = Table("", "value", title=str(run.path))
    for row in summary(run, task):
        result.add_row(*row)
    return result


def _label(name: str, metric: Metric) -> str:
    return f"{name}, {metric.unit}" if metric.unit else name


def _curve(records: Records, name: str, metric: Metric) -> Callable[[Axes], None]:
    """A metric over steps, in training and on validation data."""

    def draw(axis: Axes) -> None:
        for part in ("train", "validation"):
            some = [r for r in records if r[part] and name in r[part]]
            if not some:
                continue
            steps = [record["step"] for record in some]
            values = metric.scale * np.array([record[part][name] for record in some])
            axis.plot(steps, values, marker=".", label=part)
            if "ci95" in some[0][part]:
                half = np.array([record[part]["ci95"][name] for record in some])
                half = metric.scale * half
                axis.fill_between(steps, values - half, values + half, alpha=0.2)
        axis.set(xlabel="step", ylabel=_label(name, metric))
        if not metric.higher:
            axis.set_yscale("log")
        axis.legend()

    return draw


def _adaptation(records: Records, name: str, metric: Metric) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for record, color in zip(records, _shades(len(records)), strict=True):
            values = metric.scale * np.array(record["validation"]["curve"][name])
            axis.plot(values, color=color, marker=".")
        axis.set(xlabel="inner step", ylabel=_label(name, metric))
        if not metric.higher:
            axis.set_yscale("log")

    return draw


def _shades(number: int) -> np.ndarray:
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, number))


def _bases(records: Records) -> list[str]:
    """What the optimizer's own bases held."""
    # Before the first step a basis holds nothing.
    held = [(r["step"], r["bases"]) for r in records if r["step"]]
    if not held or not held[0][1]:
        return []
    shares = [
        key for key in ("captured", "drift") if key in next(iter(held[0][1].values()))
    ]
    body = [
        section(
            "Bases of the optimizer",
            "The share of the trace that each basis held when it was last refreshed: "
            "of the gradient's second moment, or of the covariance of the activations, "
            "whichever it follows. Drift is the mean squared sine of the angles "
            "between its last two refreshes.",
            [_shares(held, key) for key in shares],
        )
    ]
    if "values" in next(iter(held[0][1].values())):
        body.append(_spectra("Spectra of these bases", held))
    return body


def _probes(records: Records) -> list[str]:
    """What the probes saw."""
    probed = [(r["step"], r["probe"]) for r in records if r.get("probe")]
    if not probed:
        return []
    layers = [(step, probe["layers"]) for step, probe in probed]
    body = []
    if layers[0][1]:
        body += [
            _spectra("Spectra of the layers' responses", layers),
            section(
                "Captured energy and drift",
                "Left: the part of the covariance's trace in the leading eigenvalues. "
                "Right: the share of that energy which the eigenspace one evaluation "
                "earlier would have missed; 0 is no change.",
                [_shares(layers, "captured"), _shares(layers, "drift")],
            ),
        ]
    if "hessian" in probed[0][1]:

        def draw(axis: Axes) -> None:
            points = [(step, probe["hessian"]) for step, probe in probed]
            axis.plot(*zip(*points, strict=True), marker=".")
            axis.set(xlabel="step", ylabel="top eigenvalue")

        note = "The top eigenvalue of the Hessian of the loss on the probe batch."
        body.append(section("Curvature", note, [draw]))
    return body


def _spectra(title: str, seen: list[tuple[int, dict[str, Any]]]) -> str:
    """Eigenvalues by layer, one line an evaluation."""
    layers = list(seen[0][1])
    some = [layers[at] for at in spread(len(layers), MAX_PANELS)]
    left_out = len(layers) - len(some)
    note = "Eigenvalues, one line an evaluation, from dark (first) to bright (last)."
    if left_out:
        note += f" {left_out} of {len(layers)} layers are left out."

    def spectrum(layer: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for (_, found), color in zip(seen, _shades(len(seen)), strict=True):
                values = np.array(found[layer]["values"])
                # Rounding leaves values of either sign below the spectrum's own.
                values = np.where(values > 1e-9 * values.max(), values, np.nan)
                axis.plot(np.arange(1, len(values) + 1), values, color=color, lw=1)
            axis.set(title=layer, xlabel="index", ylabel="eigenvalue", yscale="log")

        return draw

    return section(title, note, [spectrum(layer) for layer in some], columns=3)


def spread(total: int, most: int) -> list[int]:
    """Up to `most` indices, evenly spread, the first and the last among them.

    Example:
      >>> spread(3, 12), spread(5, 3)
      ([0, 1, 2], [0, 2, 4])
    """
    return sorted({round(at) for at in np.linspace(0, total - 1, min(total, most))})


def _shares(seen: list[tuple[int, dict[str, Any]]], key: str) -> Callable[[Axes], None]:
    """A share of one by layer, over steps: an axis of all of [0, 1]."""

    def draw(axis: Axes) -> None:
        layers = list(seen[0][1])
        colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(layers)))
        for layer, color in zip(layers, colors, strict=True):
            points = [(step, found[layer][key]) for step, found in seen]
            known = np.array([point for point in points if point[1] is not None])
            axis.plot(*known.reshape(-1, 2).T, marker=".", color=color, label=layer)
        axis.set(xlabel="step", ylabel=f"{key}, share of 1", ylim=(-0.02, 1.02))
        if len(layers) <= MAX_PANELS:
            axis.legend(fontsize=8)

    return draw


# --- a table ------------------------------------------------------------------------


def terminal(result: dict[str, Any]) -> Table:
    """A table for the terminal."""
    table = Table(title=result["title"])
    for head in printing.head(result):
        table.add_column(head)
    for row in printing.body(result):
        table.add_row(*row)
    return table


def write_table(path: Path, result: dict[str, Any]) -> None:
    """Writes a table with a plot of each column as a page."""
    note = " ".join(filter(None, [result["claim"], result["caption"]]))
    body = [
        f'<p class="note">{html.escape(note)}</p>',
        html_table(printing.head(result), printing.body(result)),
        f'<p class="note">{html.escape(printing.notes(result))}</p>',
    ]
    panels = [_dots(result, at) for at in range(len(result["columns"]))]
    if panels:
        body.append(
            section("Seeds", "A dot for each seed, a bar for the mean.", panels)
        )
    body.append(f'<p class="note">{html.escape(printing.made(result))}</p>')
    write_atomically(path, page(result["title"], body))


def _dots(result: dict[str, Any], at: int) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        rows = [row for row in result["rows"] if row["columns"]]
        for position, row in enumerate(rows):
            values = row["columns"][at]["values"]
            axis.plot(values, [position] * len(values), "o", alpha=0.6)
            axis.plot(np.mean(values), position, "k|", markersize=22)
        axis.set_yticks(range(len(rows)), [row["contender"] for row in rows])
        column = result["columns"][at]
        unit = f", {column['unit']}" if column["unit"] else ""
        axis.set(xlabel=f"{column['metric']}{unit}{printing.VIEWS[column['view']]}")
        axis.invert_yaxis()

    return draw
