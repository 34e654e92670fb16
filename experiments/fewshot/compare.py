"""Puts methods side by side: `python -m experiments.fewshot.compare [PRESET] ...`.

A cell is one method with one seed, trained for a given time. Its test results after
500, 1000, 2000, … outer steps are kept besides the last, so that one set of cells gives
both tables: at equal steps and at equal time. Cells lie in files of their own: the
command goes on where it was stopped, and several may fill one folder.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import checks, cli, comparison, runs
from experiments.config import to_json
from experiments.fewshot import training
from experiments.fewshot.__main__ import Fewshot
from experiments.fewshot.config import METHODS, FewshotConfig
from experiments.loop import Diverged

PROG = "experiments.fewshot.compare"
FIRST_TEST = 500  # outer steps; each further test at twice as many


@dataclasses.dataclass(frozen=True)
class Compare(cli.Command):
    """Compares few-shot methods at equal outer steps and at equal training time.

    Writes the folder OUT/NAME with a file for each cell and comparison.json, and
    prints the table, losing rows included.
    """

    presets = Fewshot.presets
    preset: Fewshot.__annotations__["preset"] = "omniglot"
    """A file of configs/fewshot/ by name, or the path of another such file."""

    config: Fewshot.__annotations__["config"] = dataclasses.field(
        default_factory=FewshotConfig
    )

    methods: tuple[str, ...] = METHODS
    """The methods; differences are against the first."""

    seeds: int = 3
    """Cells of each method, with seeds from --seed on."""

    minutes: float = 10.0
    """Training time of a cell; compilation and evaluations not counted."""

    inner_rates: tuple[float, ...] = ()
    """Inner learning rates to choose from by validation, with the first seed."""

    tune_minutes: float = 1.0
    """Training time for each of these."""

    name: str = "fewshot-compare"
    """Name of the folder."""

    out: Path = Path("runs")
    """Folder of all runs."""

    def __post_init__(self):
        """Checks every value."""
        for method in self.methods:
            checks.one_of("methods", method, METHODS)
        checks.at_least("seeds", self.seeds, 1)
        checks.positive("minutes", self.minutes)
        checks.positive("tune_minutes", self.tune_minutes)
        for rate in self.inner_rates:
            checks.positive("inner_rates", rate)


@cli.keeps_memory
@cli.single_threaded_lapack
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room for every column
        console.width = 160
    with cli.user_errors(PROG):
        command = cli.parse(Compare, args, PROG)
        folder = command.out / command.name
        folder.mkdir(parents=True, exist_ok=True)
        cells = {}
        for method in command.methods:
            config = tuned(command, folder, method)
            cells[method] = [
                cell(folder, config, config.seed + index, command.minutes)
                for index in range(command.seeds)
            ]
    steps, rows = table_rows(cells)
    described = {
        "preset": command.preset,
        "config": to_json(command.config),
        "ran_on": runs.environment(),
        "minutes": command.minutes,
        "equal_steps": steps,
        "cells": cells,
        "table": rows,
    }
    runs.write_json(folder / "comparison.json", described)
    table = Table(*rows[0], title=str(folder))
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def tuned(command: Compare, folder: Path, method: str) -> FewshotConfig:
    """The config of a method, at the best of the inner learning rates."""
    config = dataclasses.replace(command.config, method=method)
    if not command.inner_rates:
        return config
    tried = {}
    for rate in command.inner_rates:
        inner = dataclasses.replace(config.inner, learning_rate=rate)
        tried[rate] = dataclasses.replace(config, inner=inner)
    merit = {
        rate: cell(folder, one, one.seed, command.tune_minutes, test=False)["merit"]
        for rate, one in tried.items()
    }
    return tried[max(merit, key=merit.get)]


def cell(
    folder: Path, config: FewshotConfig, seed: int, minutes: float, *, test: bool = True
) -> dict[str, Any]:
    """Trains one cell, or reads it where it was trained before.

    Args:
      folder: Of the cells.
      config: The experiment.
      seed: Its seed.
      minutes: Its training time.
      test: Whether to test; without, the cell is for tuning.

    Returns:
      What its file holds.
    """
    config = dataclasses.replace(config, seed=seed)
    rate = config.inner.learning_rate
    stem = f"{config.method}-{rate:g}-seed{seed}-{minutes:g}min"
    path = folder / f"{stem}{'' if test else '-tuning'}.json"
    if path.is_file():
        held = json.loads(path.read_text())
        if held["config"] != json.loads(json.dumps(to_json(config))):
            raise ValueError(
                f"name={folder.name!r}; {path} is of another config: accepted are a "
                "new name, or that config"
            )
        return held
    learner = training.make_learner(config)
    state = learner.init(seed)
    learner.compile(state)
    spent, due = 0.0, FIRST_TEST
    found: dict[str, Any] = {"config": to_json(config), "tests": {}, "diverged": None}
    part, episodes = (
        ("test", config.test_episodes) if test else ("validation", config.eval_episodes)
    )
    try:
        while spent < 60 * minutes:
            state, _, seconds = training.train(
                learner, state, until=due, seed=seed, seconds=60 * minutes - spent
            )
            spent += seconds
            if int(state.step) == due:
                due *= 2
                if test:
                    measured = learner.evaluate(state, part, episodes)
                    found["tests"][str(int(state.step))] = measured
    except Diverged as error:
        found["diverged"] = str(error)
        state = learner.init(seed)
    last = learner.evaluate(state, part, episodes)
    sign, metric = (1, "accuracy") if "accuracy" in last else (-1, "loss")
    merit = -np.inf if found["diverged"] else sign * last[metric]["mean"]
    found |= {"steps": int(state.step), "seconds": spent, "last": last}
    found |= {"merit": float(merit)}
    runs.write_json(path, found)
    return found


def table_rows(cells: dict[str, list[dict[str, Any]]]) -> tuple[int, list[dict]]:
    """The table of the cells.

    Args:
      cells: By method, in one order of seeds.

    Returns:
      The number of steps at which all were tested, and a row for each method: means ±
      standard errors over seeds, and paired differences to the first method.
    """
    common = set.intersection(
        *(set(one["tests"]) for group in cells.values() for one in group)
    )
    steps = max(map(int, common), default=0)
    picks = {"time": lambda one: one["last"]}
    if steps:
        picks = {f"{steps} steps": lambda one: one["tests"][str(steps)], **picks}
    values = {
        label: {
            name: [_value(pick(one)) for one in group] for name, group in cells.items()
        }
        for label, pick in picks.items()
    }
    first = next(iter(cells))
    rows = []
    for name, group in cells.items():
        seconds = [one["seconds"] / max(1, one["steps"]) for one in group]
        row = {
            "method": name,
            "inner rate": f"{group[0]['config']['inner']['learning_rate']:g}",
            "ms a step": f"{1e3 * np.mean(seconds):.1f}",
            "steps": f"{np.mean([one['steps'] for one in group]):.0f}",
        }
        for label, found in values.items():
            row[f"equal {label}"] = _text(found[name])
            difference = np.subtract(found[name], found[first])
            row[f"difference, {label}"] = (
                "" if name == first else _text(difference, "+")
            )
        row["diverged"] = str(sum(one["diverged"] is not None for one in group) or "")
        rows.append(row)
    return steps, rows


def _value(measured: dict[str, Any]) -> float:
    """Per cent of accuracy, or the loss."""
    if "accuracy" in measured:
        return 100 * measured["accuracy"]["mean"]
    return measured["loss"]["mean"]


def _text(values: Sequence[float], sign: str = "") -> str:
    mean, error = comparison.mean_and_error(values)
    return f"{mean:{sign}.3g}" + ("" if error is None else f" ± {error:.2g}")


if __name__ == "__main__":
    main()
