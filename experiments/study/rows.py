"""Rows of a table: what is shown of a contender in a column."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.study import statistics
from experiments.study.cells import Cell
from experiments.study.config import Config
from experiments.study.task import Metric


class Entry(NamedTuple):
    """A contender in a column.

    Attributes:
      config: Its run.
      cells: By seed.
      interior: Whether its rates lie inside what was tried.
      note: What is special about it.
    """

    config: Config
    cells: list[Cell]
    interior: bool
    note: str = ""


def described(
    entry: Entry, first: Entry | None, name: str, metric: Metric, seeds: int
) -> dict[str, Any]:
    """A contender in a column, as JSON: values by seed, their mean, the difference.

    Args:
      entry: The contender's.
      first: That of the table's first one, to which is compared.
      name: Of what is shown.
      metric: How it is read.
      seeds: Of the table.

    Returns:
      The column of its row.
    """
    scale = metric.scale
    values = [scale * cell.test[name] for cell in entry.cells]
    seconds = [cell.seconds for cell in entry.cells]
    result: dict[str, Any] = {
        "setting": entry.config.searched(),
        "interior": entry.interior,
        "few": len(values) < seeds,
        "note": entry.note,
        "digits": metric.digits,
        "steps": int(np.mean([cell.steps for cell in entry.cells])),
        "seconds": seconds,
        "milliseconds": 1e3 * sum(seconds) / max(1, sum(c.steps for c in entry.cells)),
        "disturbed": sum(cell.disturbed for cell in entry.cells),
        "diverged": [cell.diverged for cell in entry.cells if cell.diverged],
        "values": values,
        "validation": [scale * cell.validation[name] for cell in entry.cells],
        "cells": [cell.key for cell in entry.cells],
        **statistics.interval(values)._asdict(),
    }
    if metric.examples:
        share = result["mean"] / scale
        result["sampling"] = scale * statistics.sampling_error(share, metric.examples)
    if first is not None and first is not entry:
        theirs = [scale * cell.test[name] for cell in first.cells][: len(values)]
        mine = values[: len(theirs)]
        result["difference"] = {
            **statistics.interval(np.subtract(mine, theirs))._asdict(),
            "p": statistics.p_value(mine, theirs),
            "bound": statistics.upper_bound(
                np.subtract(theirs, mine)
                if metric.higher
                else np.subtract(mine, theirs)
            ),
        }
    return result


def adjust(rows: list[dict[str, Any]]) -> None:
    """Gives every p-value of a table its adjusted one, `holm`."""
    tested = [
        column["difference"]
        for row in rows
        for column in row["columns"]
        if "difference" in column
    ]
    adjusted = statistics.holm([difference["p"] for difference in tested])
    for difference, value in zip(tested, adjusted, strict=True):
        difference["holm"] = value


def front(rows: list[dict[str, Any]], metrics: Sequence[Metric], margin: float) -> None:
    """Says of every row of a table by whom it is beaten, `beaten_by`.

    One is beaten by another that is better in one column, by a p-value adjusted for all
    pairs and columns, and in no other column worse by more than a margin (the bound of
    95 %). Those that nobody beats are the front.

    Args:
      rows: With one column for each metric.
      metrics: How they are read.
      margin: In the unit that is printed.
    """
    able = [row for row in rows if row["columns"]]
    signs = [1.0 if metric.higher else -1.0 for metric in metrics]
    gains = {}
    for one, other in itertools.permutations(able, 2):
        pairs = zip(one["columns"], other["columns"], signs, strict=True)
        for at, (mine, theirs, sign) in enumerate(pairs):
            few = min(len(mine["values"]), len(theirs["values"]))
            gain = np.subtract(theirs["values"][:few], mine["values"][:few])
            gains[one["contender"], other["contender"], at] = sign * gain
    tested = statistics.holm([statistics.p_value(g, 0 * g) for g in gains.values()])
    better = {
        key
        for (key, gain), p in zip(gains.items(), tested, strict=True)
        if p is not None and p < 1 - statistics.LEVEL and np.mean(gain) > 0
    }
    worse = {
        key
        for key, gain in gains.items()
        if (bound := statistics.upper_bound(-gain)) is None or bound > margin
    }
    columns = range(len(metrics))
    for one in able:
        name = one["contender"]
        one["beaten_by"] = [
            other
            for other in (row["contender"] for row in able)
            if any(
                (name, other, at) in better
                and not any((name, other, i) in worse for i in columns if i != at)
                for at in columns
            )
        ]
