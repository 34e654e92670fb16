"""Does one rate serve all widths? `python -m experiments.rates [PRESET] [--options]`.

A rate that was found on a small model is worth something on a large one only where the
best rate does not move with the width. All contenders are run over one grid of rates at
each width; nothing else changes.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments import checks, cli, process
from experiments.bench.report import check_file, show
from experiments.config import ImageConfig, TextConfig
from experiments.study import report, runs
from experiments.study.cells import Cell, Spec, Store, merit
from experiments.study.config import Config
from experiments.study.task import Metric

PROG = "experiments.rates"


@dataclasses.dataclass(frozen=True)
class Rates(cli.Command):
    """Validation loss by rate, at several widths of one model.

    Prints the table. With OUT it is written there as JSON, and the curves beside it as
    SVG. It goes on where it was stopped.
    """

    contenders: tuple[str, ...] = ()
    """Optimizers as text. By default that of the preset alone."""

    widths: tuple[int, ...] = (256, 1024)
    """Of all hidden layers of an mlp, or of a Transformer."""

    neighbours: int = 3
    """How many rates are tried on either side of a contender's default, a factor of
    three apart."""

    metric: str = "loss"
    """What is compared, on validation data."""

    seeds: int = 2
    """Runs of each, with seeds from --seed on."""

    cells: Path = Path("runs/rates")
    """Folder of the runs."""

    out: Path | None = None
    """JSON file of the table."""


def widened(config: Config, width: int) -> Config:
    """The config of a model of another width.

    Raises:
      ValueError: Its model has no single width.
    """
    if isinstance(config, TextConfig):
        return dataclasses.replace(config, width=width)
    if isinstance(config, ImageConfig) and config.model.name == "mlp":
        depth = len(config.model.options.get("hidden", (width, width)))
        options = config.model.options | {"hidden": (width,) * depth}
        model = dataclasses.replace(config.model, options=options)
        return dataclasses.replace(config, model=model)
    raise ValueError(
        f"PRESET has a {type(config).__name__}; accepted are text, and images with "
        "--model.name mlp"
    )


def specs(command: Rates) -> dict[tuple[str, int, int], list[Spec]]:
    """The runs: by contender, width, and number of the rate from the default."""
    names = command.contenders or (command.config.contender,)
    first = command.config.seed
    found = {}
    for name in names:
        for width in command.widths:
            config = widened(command.config, width).with_contender(name)
            for at in range(-command.neighbours, command.neighbours + 1):
                found[name, width, at] = [
                    Spec(dataclasses.replace(config.at({"rate": at}), seed=seed), False)
                    for seed in range(first, first + command.seeds)
                ]
    return found


def rows(
    wanted: dict[tuple[str, int, int], list[Spec]],
    found: dict[tuple[str, int, int], list[Cell]],
    name: str,
    metric: Metric,
) -> list[dict[str, Any]]:
    """One row for each contender, width and rate; the best rate of a width is marked.

    Runs that diverged have no value.
    """
    merits = {
        key: float(np.mean([merit(cell, name, metric) for cell in cells]))
        for key, cells in found.items()
    }
    best: dict[tuple[str, int], float] = {}
    for (contender, width, _), value in merits.items():
        best[contender, width] = min(value, best.get((contender, width), np.inf))
    scale = -metric.scale if metric.higher else metric.scale
    return [
        {
            "contender": contender,
            "width": str(width),
            "rate": wanted[contender, width, at][0].config.searched()["rate"],
            name: scale * value if np.isfinite(value) else "diverged",
            "best": "*" * (np.isfinite(value) and value == best[contender, width]),
        }
        for (contender, width, at), value in merits.items()
    ]


def panel(name: str, own: list[dict[str, Any]], metric: str) -> Any:
    """A contender's curves, one for each width."""

    def draw(axis: Axes) -> None:
        for width in dict.fromkeys(row["width"] for row in own):
            line = [r for r in own if r["width"] == width and r[metric] != "diverged"]
            rates, values = [r["rate"] for r in line], [r[metric] for r in line]
            axis.plot(rates, values, marker=".", label=f"width {width}")
        axis.set(xlabel="rate", ylabel=metric, title=name, xscale="log")
        axis.legend()

    return draw


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        command = cli.parse(Rates, args, PROG)
        checks.counts("widths", command.widths, checks.MOST_WIDE)
        checks.count("neighbours", command.neighbours)
        checks.count("seeds", command.seeds)
        check_file(command.out)
        wanted = specs(command)
        store = Store(command.cells, tell=console.print)
        task = store.task(next(iter(wanted.values()))[0].config)
        checks.one_of("metric", command.metric, task.metrics)
        metric = task.metrics[command.metric]
        found = {key: store.run(group) for key, group in wanted.items()}
    table = rows(wanted, found, command.metric, metric)
    title = (
        f"{Path(command.preset).stem}: validation {command.metric} by rate, means over "
        f"{command.seeds} seeds, * the best of a width"
    )
    show({title: table}, console, command.out)
    if command.out is not None:
        names = dict.fromkeys(row["contender"] for row in table)
        panels = [
            panel(name, [r for r in table if r["contender"] == name], command.metric)
            for name in names
        ]
        picture = report.standalone(report.figure(panels))
        runs.write_atomically(command.out.with_suffix(".svg"), picture)


if __name__ == "__main__":
    main()
