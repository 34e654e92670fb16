"""Puts methods side by side: `python -m experiments.fewshot.compare [PRESET] ...`.

A cell is one method with one seed, trained for a given time. Its test results after
500, 1000, 2000, … outer steps are kept besides the last, so that one set of cells
gives both tables: at equal steps and at equal time. Cells lie in files of their own
(`cells`), so the command goes on where it was stopped, and commands with different
methods or seeds may fill one folder.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from experiments import checks, cli, comparison, process, runs
from experiments.config import to_json
from experiments.fewshot import training
from experiments.fewshot.__main__ import Fewshot
from experiments.fewshot.cells import Cell, train_cell
from experiments.fewshot.config import METHODS, FewshotConfig

PROG = "experiments.fewshot.compare"


@dataclasses.dataclass(frozen=True)
class Compare(cli.Command):
    """Compares few-shot methods at equal outer steps and at equal training time.

    Writes the folder OUT/NAME with a file for each cell and comparison.json, and
    prints the table, losing rows included. --outer.steps, --outer.minutes and
    --eval-every have no part in it.
    """

    presets = Fewshot.presets

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET]")] = (
        "omniglot"
    )
    """A file of configs/fewshot/ by name, or the path of another such file."""

    config: Annotated[FewshotConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=FewshotConfig
    )

    methods: tuple[str, ...] = METHODS
    """The methods; differences and tests are against the first."""

    seeds: int = 3
    """Cells of each method, with seeds from --seed on."""

    minutes: float = 10.0
    """Training time of a cell; compilation and evaluations not counted."""

    inner_rates: tuple[float, ...] = ()
    """Inner learning rates to choose from on validation tasks, with the first seed; by
    default that of the config is taken."""

    outer_rates: tuple[float, ...] = ()
    """Outer learning rates, likewise, at the inner learning rate that was chosen."""

    tune_minutes: float = 1.0
    """Training time for each of these."""

    name: str | None = None
    """Name of the folder; by default fewshot-PRESET."""

    out: Path = Path("runs")
    """Folder of all runs."""

    def __post_init__(self):
        """Checks every value."""
        for method in self.methods:
            checks.one_of("methods", method, METHODS)
            dataclasses.replace(self.config, method=method)  # which checks it
        checks.some("methods", self.methods)
        checks.count("seeds", self.seeds)
        checks.seed("seed with seeds", self.config.seed + self.seeds - 1)
        checks.positive("minutes", self.minutes)
        checks.positive("tune_minutes", self.tune_minutes)
        for name in ("inner_rates", "outer_rates"):
            for rate in getattr(self, name):
                checks.positive(name, rate)


@process.keeps_memory
@process.keeps_programs
@process.single_threaded_lapack
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        command = cli.parse(Compare, args, PROG)
        name = command.name or f"fewshot-{Path(command.preset).stem}"
        for method in command.methods:  # which finds what does not fit the data
            training.make_learner(dataclasses.replace(command.config, method=method))
        runs.check_name(name, command.out)
        folder = command.out / name
        runs.make_folder(folder / "comparison.json")
        first = command.config.seed
        chosen = {method: tuned(command, folder, method) for method in command.methods}
        cells: dict[str, list[Cell]] = {method: [] for method in command.methods}
        # Methods alternate, so that a drift of the machine meets all alike.
        for seed in range(first, first + command.seeds):
            for method, config in chosen.items():
                config = dataclasses.replace(config, seed=seed)
                cell = train_cell(folder, config, command.minutes)
                cells[method].append(cell)
                console.print(f"{method}, seed {seed}: {cell.text()}")
    steps = common_steps(cells)
    rows = [table_row(command, cells, method, steps) for method in cells]
    described = {
        "preset": command.preset,
        "config": to_json(command.config),
        "minutes": command.minutes,
        "equal_steps": steps,
        "cells": {
            method: [dataclasses.asdict(cell) for cell in group]
            for method, group in cells.items()
        },
        "table": rows,
    }
    runs.write_json(folder / "comparison.json", described)
    table = Table(*rows[0], title=str(folder))
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print(footnotes(command, cells))
    if not steps:
        console.print("No number of steps was reached by every cell before a test.")


def footnotes(command: Compare, cells: dict[str, list[Cell]]) -> str:
    """What the figures of the table are."""
    some = next((c.last for group in cells.values() for c in group if c.last), {})
    unit = "Accuracy in per cent" if "accuracy" in some else "Loss, lower is better"
    config = command.config
    text = (
        f"{unit}: mean ± standard error over seeds, each with {config.test_episodes} "
        "test tasks of its own, the same for all methods; differences and paired "
        f"t-tests against {command.methods[0]}."
    )
    grids = {"inner": command.inner_rates, "outer": command.outer_rates}
    for name, grid in grids.items():
        if len(grid) > 1:
            text += (
                f" The {name} rate is the best of {', '.join(f'{r:g}' for r in grid)} "
                f"on {config.eval_episodes} validation tasks, after "
                f"{command.tune_minutes:g} min with the first seed (* at the edge)."
            )
        else:
            text += f" The {name} rate was not tuned here."
    return text + " Runs that diverged are left out of the means."


def tuned(command: Compare, folder: Path, method: str) -> FewshotConfig:
    """The config of a method, at the best of the learning rates."""
    config = dataclasses.replace(command.config, method=method)
    grids = {"inner": command.inner_rates, "outer": command.outer_rates}
    for name, grid in grids.items():
        if len(grid) == 1:  # a given rate holds while the other is tuned
            config = with_rate(config, name, *grid)
    for name, grid in grids.items():
        if len(grid) > 1:
            tried = [with_rate(config, name, rate) for rate in grid]
            minutes = command.tune_minutes
            cells = [train_cell(folder, one, minutes, test=False) for one in tried]
            config = tried[int(np.argmax([cell.merit for cell in cells]))]
    return config


def with_rate(config: FewshotConfig, name: str, rate: float) -> FewshotConfig:
    """The config with another learning rate, `"inner"` or `"outer"`."""
    option = dataclasses.replace(getattr(config, name), learning_rate=rate)
    return dataclasses.replace(config, **{name: option})


def common_steps(cells: dict[str, list[Cell]]) -> int:
    """The most outer steps after which every cell that did not diverge was tested."""
    tested = [
        set(map(int, cell.tests))
        for group in cells.values()
        for cell in group
        if not cell.diverged
    ]
    return max(set.intersection(*tested), default=0) if tested else 0


def table_row(
    command: Compare, cells: dict[str, list[Cell]], method: str, steps: int
) -> dict[str, str]:
    """The row of a method, as text."""
    group, first = cells[method], cells[command.methods[0]]
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(group, first, strict=True)
        if not (mine.diverged or theirs.diverged)
    ]
    finished = [cell for cell in group if not cell.diverged]
    times = [1e3 * cell.seconds / cell.steps for cell in finished]
    config = group[0].config
    row = {
        "method": method,
        "inner": _rate(config["inner"]["learning_rate"], command.inner_rates),
        "outer": _rate(config["outer"]["learning_rate"], command.outer_rates),
        "ms a step": f"{np.mean(times):.1f}" if times else "",
        "steps": f"{np.mean([cell.steps for cell in finished]):.0f}" if times else "",
    }
    columns = {f"after {steps} steps": str(steps)} if steps else {}
    for title, at in {**columns, f"after {command.minutes:g} min": None}.items():
        row[title] = _text([cell.value(at) for cell in finished])
        mine, theirs = ([pair[i].value(at) for pair in pairs] for i in (0, 1))
        is_first = method == command.methods[0]
        row["difference " + title] = "" if is_first else _difference(mine, theirs)
    row["diverged"] = str(sum(cell.diverged is not None for cell in group) or "")
    return row


def _rate(rate: float, grid: Sequence[float]) -> str:
    return f"{rate:g}" + " *" * (len(grid) > 1 and rate in (min(grid), max(grid)))


def _text(values: Sequence[float], sign: str = "") -> str:
    if not len(values):
        return ""
    mean, error = comparison.mean_and_error(values)
    return f"{mean:{sign}.4g}" + ("" if error is None else f" ± {error:.2g}")


def _difference(mine: Sequence[float], theirs: Sequence[float]) -> str:
    p_value = comparison.paired_p_value(mine, theirs)
    note = "" if p_value is None else f" (p {p_value:.2g})"
    return _text(np.subtract(mine, theirs), "+") + note


if __name__ == "__main__":
    main()
