"""Rows of a table: what is shown of a contender in a column."""

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
    scale, overlap = metric.scale, entry.config.overlap
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
        **statistics.interval(values, overlap)._asdict(),
    }
    if metric.examples:
        share = result["mean"] / scale
        result["sampling"] = scale * statistics.sampling_error(share, metric.examples)
    if first is not None and first is not entry:
        theirs = [scale * cell.test[name] for cell in first.cells][: len(values)]
        mine = values[: len(theirs)]
        result["difference"] = {
            **statistics.interval(np.subtract(mine, theirs), overlap)._asdict(),
            "p": statistics.p_value(mine, theirs, overlap),
            "bound": statistics.upper_bound(
                np.subtract(theirs, mine)
                if metric.higher
                else np.subtract(mine, theirs),
                overlap,
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


def front(
    rows: list[dict[str, Any]],
    metrics: Sequence[Metric],
    margin: float,
    overlap: float = 0.0,
) -> None:
    """Says of every row of a table by whom it is shown to be beaten, `beaten_by`.

    One is beaten by another that is better in one column, by a one-sided p-value that
    is adjusted for all others and columns (Holm), and in no other column worse by more
    than a margin (the bound of 95 %). Of few seeds little can be shown: that nobody is
    shown to beat a contender does not say that it is as good.

    Args:
      rows: With one column for each metric.
      metrics: How they are read.
      margin: In the unit that is printed.
      overlap: See `statistics`.
    """
    able = [row for row in rows if row["columns"]]
    for one in able:
        others = [row for row in able if row is not one]
        gains = [_gains(one, other, metrics) for other in others]
        p_values = iter(
            statistics.holm([_p_better(g, overlap) for own in gains for g in own])
        )
        one["beaten_by"] = []
        for other, own in zip(others, gains, strict=True):
            better = [next(p_values) < 1 - statistics.LEVEL for _ in own]
            bounds = [statistics.upper_bound(-gain, overlap) for gain in own]
            worse = [bound is None or bound > margin for bound in bounds]
            if any(
                is_better and not any(w for i, w in enumerate(worse) if i != at)
                for at, is_better in enumerate(better)
            ):
                one["beaten_by"].append(other["contender"])


def _gains(
    one: dict[str, Any], other: dict[str, Any], metrics: Sequence[Metric]
) -> list[np.ndarray]:
    """By how much another is better in each column, seed by seed."""
    found = []
    for mine, theirs, metric in zip(
        one["columns"], other["columns"], metrics, strict=True
    ):
        few = min(len(mine["values"]), len(theirs["values"]))
        gain = np.subtract(theirs["values"][:few], mine["values"][:few])
        found.append(gain if metric.higher else -gain)
    return found


def _p_better(gain: np.ndarray, overlap: float) -> float:
    """The one-sided p-value; 1 where nothing can be said."""
    if len(gain) < 2 or not gain.mean() > 0:
        return 1.0
    p = statistics.p_value(gain, np.zeros_like(gain), overlap)
    return 0.0 if p is None else p / 2  # None: the same in every seed
