"""Tables as text: the heads, the rows, the notes under them, and Markdown of all.

Everything printed is read from what `tables.compute` returns, which is what the JSON
file holds.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

VIEWS = {
    "evaluations": "",
    "time": " in equal time",
    "loss": " of the shortest run that reaches {first}'s mean",
}


RUNS = ["setting", "steps", "s"]


def head(result: dict[str, Any]) -> list[str]:
    """The heads of a table's columns; runs that several are of are described once.

    Example:
      >>> columns = [{"metric": name, "unit": "", "view": "time"} for name in "ab"]
      >>> head({"columns": columns, "rows": [{"columns": [{"cells": ["x"]}] * 2}]})[3:6]
      ['s', 'a in equal time', 'difference']
      >>> head({"columns": columns, "rows": [{"columns": [{"cells": ["x"]}] * 2}]})[7:]
      ['b in equal time', 'difference', 'p (Holm)']
    """
    found = ["contender"]
    for column, again in zip(result["columns"], _same_runs(result), strict=True):
        unit = f", {column['unit']}" if column["unit"] else ""
        view = VIEWS[column["view"]].format(first="the first one")
        title = f"{column['metric']}{unit}{view}"
        found += [] if again else RUNS
        found += [title, "difference", "p (Holm)"]
    return found + ["shown beaten by"] * _says_front(result)


def body(result: dict[str, Any]) -> list[list[str]]:
    """The rows of a table, as text."""
    rows, same = [], _same_runs(result)
    for row in result["rows"]:
        words = [row["contender"]]
        for column, again in zip(row["columns"], same, strict=False):
            words += entry(column)[len(RUNS) * again :]
        if row.get("failed"):
            words += [f"no result: {row['failed']}"]
        words += [""] * (len(head(result)) - _says_front(result) - len(words))
        if _says_front(result):
            words += [_beaten(row["beaten_by"]) if "beaten_by" in row else ""]
        rows.append(words)
    return rows


def _says_front(result: dict[str, Any]) -> bool:
    """Whether a table says by whom each contender is beaten."""
    return any("beaten_by" in row for row in result["rows"])


def _beaten(names: list[str]) -> str:
    """By nobody, by one, or by one and so many more.

    Example:
      >>> _beaten([]), _beaten(["sgd"]), _beaten(["sgd", "adam", "sam"])
      ('nobody', 'sgd', 'sgd and 2 more')
    """
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else "nobody"


def _same_runs(result: dict[str, Any]) -> list[bool]:
    """Of each column, whether it is of the runs of the column before it."""
    made = lambda at: [
        row["columns"][at]["cells"]
        for row in result["rows"]
        if at < len(row["columns"])
    ]
    numbers = range(len(result["columns"]))
    return [at > 0 and made(at) == made(at - 1) for at in numbers]


def entry(column: dict[str, Any]) -> list[str]:
    """A contender in a column, as text.

    Example:
      >>> entry({"setting": {"rate": 0.01}, "interior": True, "steps": 10, "note": "",
      ...   "seconds": [1.0, 2.0], "mean": 97.0, "low": 96.5, "high": 97.5, "digits": 2,
      ...   "few": False, "values": [97.0, 97.0], "diverged": [], "disturbed": 0})
      ['rate 0.01', '10', '1.50', '97.00 ± 0.50', '', '']
    """
    setting = ", ".join(
        f"{key} {value:.3g}" for key, value in column["setting"].items()
    )
    notes = [
        column["note"],
        f"{len(column['diverged'])} diverged" if column["diverged"] else "",
        f"{column['disturbed']} disturbed" if column["disturbed"] else "",
        f"{len(column['values'])} seeds" if column["few"] else "",
    ]
    note = "; ".join(filter(None, notes))
    difference = column.get("difference")
    holm = difference and difference["holm"]
    return [
        setting + " *" * (not column["interior"]),
        str(column["steps"]),
        seconds(column),
        number(column, column["digits"]) + (f" ({note})" if note else ""),
        number(difference, column["digits"], "+") if difference else "",
        "" if holm is None else f"{holm:.2g}",
    ]


def seconds(column: dict[str, Any]) -> str:
    """The mean time of training.

    Example:
      >>> seconds({"seconds": [1.0, 2.0]}), seconds({"seconds": [123.4]})
      ('1.50', '123')
    """
    mean = float(np.mean(column["seconds"]))
    return f"{mean:.0f}" if mean >= 100 else f"{mean:#.3g}"


def number(value: dict[str, Any], digits: int, sign: str = "") -> str:
    """A mean with half its interval.

    Example:
      >>> number({"mean": 0.5, "low": 0.25, "high": 0.75}, 3, "+")
      '+0.500 ± 0.250'
    """
    text = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is None or not math.isfinite(value["mean"]):
        return text
    return f"{text} ± {(value['high'] - value['low']) / 2:.{digits}f}"


def notes(result: dict[str, Any]) -> str:
    """What the numbers of a table are."""
    columns = [column for row in result["rows"] for column in row["columns"]]
    first, seeds = result["rows"][0]["contender"], result["seeds"]
    text = (
        f"Test data: mean with 95 % interval over {seeds} seed{'s' * (seeds != 1)}, "
        f"paired differences to {first} with theirs, p adjusted for the table (Holm). "
    )
    if result["tuned"]:
        text += (
            f"Searched on validation data: {', '.join(result['tuned'])}, until the "
            "best is inside of what was tried"
        )
        outside = not all(column["interior"] for column in columns)
        text += " (* where it is not). " if outside else ". "
    else:
        text += "Nothing was tuned here. "
    if samplings := [c["sampling"] for c in columns if "sampling" in c]:
        text += f"The choice of test examples adds ± {max(samplings):.2f}. "
    if result.get("overlap"):
        text += (
            "Each seed is tested on another fold of the images for training and test; "
            "intervals and p allow for training sets that overlap (Nadeau and Bengio, "
            "2003). "
        )
    if _says_front(result):
        text += (
            "One is shown to beat another where it is better in one column (p adjusted "
            "for all that could beat that one) and in no other worse by more than "
            f"{result['margin']:g} (bound of 95 %); few seeds show little. "
        )
    if result.get("trial_length") == 1:
        text += "Rates were searched at the length of the final runs. "
    budget = result["budget"]
    return text + (
        f"{budget['used']:.1f} minutes of training, tuning included (budget "
        f"{budget['minutes']:g})."
    )


def made(result: dict[str, Any]) -> str:
    """Where a table comes from: command, commit, machine, date."""
    ran_on, commit = result["ran_on"], result["commit"]
    return (
        f"`{result['command']}`, commit {commit[:10]}{'+' * commit.endswith('+')}, "
        f"{ran_on['processor']}, {ran_on['cores']} cores, jax {ran_on['jax']}, "
        f"{result['date'][:10]}"
    )


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table of text.

    Example:
      >>> markdown_table(["a", "b"], [["1", "2"]])
      ['| a | b |', '| --- | --- |', '| 1 | 2 |']
    """
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(words) + " |" for words in lines]


def markdown(result: dict[str, Any]) -> str:
    """A table with claim, notes and provenance, as Markdown."""
    parts = [
        result["claim"],
        "",
        *markdown_table(head(result), body(result)),
        "",
        " ".join(filter(None, [result["caption"], notes(result)])),
        "",
        made(result),
    ]
    return "\n".join(parts) + "\n"
