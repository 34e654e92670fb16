"""The report of a run: one HTML file with its plots inside, and a closing table."""

import html
import io
import json
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from experiments.config import to_json
from experiments.runs import Run, write_atomically

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
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dsbp_jax",
}


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


def page(title: str, body: Iterable[str]) -> str:
    """A self-contained HTML page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
        f"{html.escape(title)}</title><style>{_STYLE}</style><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(body)}</body></html>\n"
    )


def section(title: str, note: str, content: str) -> str:
    """A heading, what the plot shows, and the plot."""
    return f'<h2>{title}</h2><p class="note">{note}</p>{content}'


def write_report(run: Run) -> None:
    """Writes `report.html` from the metrics of a run.

    Args:
      run: A run with at least one evaluation.
    """
    records = [record for record in run.records() if "validation" in record]
    probes = [record for record in records if record["probe"] is not None]
    body = [
        html_table(["", "value"], summary(run)),
        section(
            "Training",
            "Training values are means over the last epoch, before each step; "
            "validation is measured after it.",
            figure([_curve(records, "loss"), _curve(records, "accuracy")]),
        ),
    ]
    if records[0]["bases"]:
        body.append(
            section(
                "Bases of the optimizer",
                "The share of the trace that each basis held when it was last "
                "refreshed: of the gradient's second moment, or of the covariance of "
                "the activations, whichever it follows.",
                figure([_captured(records)]),
            )
        )
    if probes:
        body += _spectral_sections(probes)
    write_page(run, body)


def write_page(run: Run, body: Iterable[str]) -> None:
    """Writes `report.html` of a run, its configuration at the end."""
    config = json.dumps(to_json(run.config), indent=2)
    end = f"<h2>Configuration</h2><pre>{html.escape(config)}</pre>"
    write_atomically(run.path / "report.html", page(run.path.name, [*body, end]))


def summary(run: Run) -> list[tuple[str, str]]:
    """The closing numbers of a run: names and values."""
    records = [record for record in run.records() if "validation" in record]
    last, config = records[-1], run.config
    best = max(record["validation"]["accuracy"] for record in records)
    rows = [
        ("data", config.data.name),
        ("model", config.model.name),
        (
            "optimizer",
            f"{config.optimizer.label}, learning rate {config.optimizer.peak:g}",
        ),
        ("epochs", f"{last['epoch']} ({last['step']} steps)"),
    ]
    if last["train"]:
        rows.append(("training loss", f"{last['train']['loss']:.4f}"))
    accuracy = last["validation"]["accuracy"]
    rows.append(("validation accuracy", f"{accuracy:.2%} (best {best:.2%})"))
    if result := run.result():
        rows.append(("test accuracy", f"{result['test']['accuracy']:.2%}"))
    if last["probe"] and "hessian" in last["probe"]:
        rows.append(("top Hessian eigenvalue", f"{last['probe']['hessian']:.4g}"))
    if last["probe"] and last["probe"]["layers"]:
        captured = [x["captured"] for x in last["probe"]["layers"].values()]
        rank = config.optimizer.rank
        rows.append((f"energy in rank {rank}, least", f"{min(captured):.1%}"))
    if failures := sum(leaf["failures"] for leaf in last["bases"].values()):
        rows.append(("refreshes that failed", str(failures)))
    rows.append(("training time", f"{last['seconds']:.1f} s"))
    return rows


def closing_table(run: Run) -> Table:
    """The summary as a table for the terminal."""
    return names_and_values(str(run.path), summary(run))


def names_and_values(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Closing numbers as a table for the terminal."""
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table."""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row)
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{lines}</table>"


def _curve(records: list[dict[str, Any]], key: str) -> Callable[[Axes], None]:
    """Loss or accuracy over epochs."""

    def draw(axis: Axes) -> None:
        for name in ("train", "validation"):
            points = [(r["epoch"], r[name][key]) for r in records if r[name]]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xlabel="epoch", ylabel=key)
        if key == "loss":
            axis.set_yscale("log")
        axis.legend()

    return draw


def _spectral_sections(probes: list[dict[str, Any]]) -> list[str]:
    """What the probes saw."""
    layers = list(probes[0]["probe"]["layers"])
    sections = []
    if layers:
        some = [layers[i] for i in _spread(len(layers), MAX_PANELS)]
        left_out = len(layers) - len(some)
        some_note = f" {left_out} of {len(layers)} layers are left out." * bool(
            left_out
        )
        sections += [
            section(
                "Spectra of the layers",
                "Eigenvalues of the covariance of each layer's response, one line an "
                f"evaluation, from dark (first) to bright (last).{some_note}",
                figure([_spectrum(probes, layer) for layer in some], columns=3),
            ),
            section(
                "Captured energy and drift",
                "Left: the part of the covariance's trace in the leading eigenvalues. "
                "Right: the share of that energy which the eigenspace one evaluation "
                "earlier would have missed; 0 is no change.",
                figure(
                    [
                        _over_epochs(probes, layers, "captured", "captured energy"),
                        _over_epochs(probes, layers, "drift", "drift of the basis"),
                    ]
                ),
            ),
        ]
    if "hessian" in probes[0]["probe"]:
        sections.append(
            section(
                "Curvature",
                "The top eigenvalue of the Hessian of the loss on the probe batch.",
                figure([_hessian(probes)]),
            )
        )
    return sections


def _spread(total: int, most: int) -> list[int]:
    """Up to `most` indices, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, most))})


def _spectrum(probes: list[dict[str, Any]], layer: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(probes)))
        for record, color in zip(probes, colors, strict=True):
            values = np.array(record["probe"]["layers"][layer]["values"])
            # Rounding leaves values of either sign below the spectrum's own.
            values = np.where(values > 1e-9 * values[:1], values, np.nan)
            axis.plot(np.arange(1, len(values) + 1), values, color=color, lw=1)
        axis.set(title=layer, xlabel="index", ylabel="eigenvalue", yscale="log")

    return draw


def _over_epochs(
    probes: list[dict[str, Any]], layers: list[str], key: str, label: str
) -> Callable[[Axes], None]:
    return lambda axis: _lines(
        axis,
        {
            layer: [(r["epoch"], r["probe"]["layers"][layer][key]) for r in probes]
            for layer in layers
        },
        label,
    )


def _captured(records: list[dict[str, Any]]) -> Callable[[Axes], None]:
    # Before the first step a basis holds nothing.
    return lambda axis: _lines(
        axis,
        {
            leaf: [(r["epoch"], r["bases"][leaf]["captured"]) for r in records[1:]]
            for leaf in records[0]["bases"]
        },
        "captured energy",
    )


def _lines(
    axis: Axes, curves: dict[str, list[tuple[int, float | None]]], label: str
) -> None:
    """One line for each name, over epochs; unknown values are left out."""
    colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(curves)))
    for (name, points), color in zip(curves.items(), colors, strict=True):
        known = np.array([point for point in points if point[1] is not None])
        axis.plot(*known.reshape(-1, 2).T, marker=".", color=color, label=name)
    axis.set(xlabel="epoch", ylabel=label)
    if len(curves) <= MAX_PANELS:
        axis.legend(fontsize=8)


def _hessian(probes: list[dict[str, Any]]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        points = [(r["epoch"], r["probe"]["hessian"]) for r in probes]
        axis.plot(*zip(*points, strict=True), marker=".")
        axis.set(xlabel="epoch", ylabel="top eigenvalue")

    return draw
