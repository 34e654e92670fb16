"""The few results that README.md shows: what is compared, and in which file.

Two kinds: a `Duel` of two contenders of a table, paired by seed, and a `Ratio` of two
rows of a benchmark. Each becomes a row with a link. Of duels there are intervals, and
who is ahead is said by one rule, for wins and losses alike: where the 95 % interval of
the paired difference holds zero, nobody is. Benchmarks give medians or means of one
machine, without an interval, and their rows name nobody.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments.study import printing, statistics

FOLDER = "experiments/results"
HEAD = ("what", "ours", "theirs", "ours − theirs, or ×", "ahead", "file")

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Duel:
    """Two contenders in a column of a table.

    Attributes:
      what: The question, in a few words.
      table: Its file.
      ours: A contender.
      theirs: Another.
      metric: Of the column; None for the table's first.
      view: Likewise, one of `tables.VIEWS`.
    """

    what: str
    table: str
    ours: str
    theirs: str
    metric: str | None = None
    view: str = "evaluations"

    def found(self, results: Results) -> tuple[dict[str, Any], ...]:
        """The column, and both entries in it."""
        result = results[self.table]
        (at, column), *_ = [
            (at, column)
            for at, column in enumerate(result["columns"])
            if column["view"] == self.view and self.metric in (None, column["metric"])
        ]
        entries = {row["contender"]: row["columns"] for row in result["rows"]}
        return column, entries[self.ours][at], entries[self.theirs][at]

    def pairs(self, results: Results, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`values` or `seconds` of ours and of theirs, of the seeds that both have."""
        _, *entries = self.found(results)
        few = min(len(entry["values"]) for entry in entries)
        mine, other = (np.array(entry[name][:few]) for entry in entries)
        return mine, other

    def gains(self, results: Results) -> np.ndarray:
        """By how much ours is better, seed by seed."""
        column, *_ = self.found(results)
        change = np.subtract(*self.pairs(results, "values"))
        return change if column["higher"] else -change

    def p_value(self, results: Results) -> float | None:
        """That of the paired t-test."""
        pairs = self.pairs(results, "values")
        return statistics.p_value(*pairs, self._overlap(results))

    def _overlap(self, results: Results) -> float:
        """How far the runs of its seeds share examples; see `statistics`."""
        return results[self.table].get("overlap", 0.0)

    def _interval(self, results: Results, values: Any) -> statistics.Interval:
        return statistics.interval(values, self._overlap(results))

    def change(self, results: Results) -> tuple[statistics.Interval, str]:
        """Ours less theirs, and the same as text with its unit."""
        column, mine, _ = self.found(results)
        values = np.subtract(*self.pairs(results, "values"))
        change = self._interval(results, values)
        unit = f" {column['unit']}" if column["unit"] else ""
        return change, printing.number(change._asdict(), mine["digits"], "+") + unit

    def row(self, results: Results) -> list[str]:
        """The row, as text."""
        column, mine, other = self.found(results)
        few = len(self.pairs(results, "values")[0])
        if self.view == "loss":  # what counts is the time that it took
            ratios = np.divide(*self.pairs(results, "seconds"))
            ratio = self._interval(results, ratios)
            text = f"× {printing.number(ratio._asdict(), 2)} in time"
            who = ahead(self._interval(results, ratios - 1), False)
        else:
            difference, text = self.change(results)
            who = ahead(difference, column["higher"])

        def shown(entry: dict[str, Any]) -> str:
            mean = self._interval(results, entry["values"][:few])._asdict()
            seconds = printing.seconds({"seconds": entry["seconds"][:few]})
            disturbed = " (disturbed)" if entry.get("disturbed") else ""
            return f"{printing.number(mean, entry['digits'])}, {seconds} s{disturbed}"

        view = printing.VIEWS[self.view].format(first=f"`{self.theirs}`")
        return [
            f"{self.what}: {column['metric']}{view}",
            f"`{self.ours}` {shown(mine)}",
            f"`{self.theirs}` {shown(other)}",
            f"{text}, {few} seeds",
            who,
            link(self.table),
        ]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A number of two rows of a benchmark, the one over the other.

    Attributes:
      what: The question, in a few words.
      file: Its file.
      table: Its title there.
      ours: A row, by its first cell.
      theirs: Another.
      column: The number.
    """

    what: str
    file: str
    table: str
    ours: str
    theirs: str
    column: str

    def row(self, results: Results) -> list[str]:
        """The row, as text."""
        rows = results[self.file]["tables"][self.table]
        found = {next(iter(row.values())): row[self.column] for row in rows}
        mine, other = found[self.ours], found[self.theirs]
        return [
            f"{self.what}: {self.column}",
            f"{self.ours}: {mine:.4g}",
            f"{self.theirs}: {other:.4g}",
            f"× {mine / other:.3g}",
            "",
            link(self.file),
        ]


def ahead(difference: statistics.Interval, higher: bool) -> str:
    """Who is ahead, by the interval of ours less theirs.

    Example:
      >>> ahead(statistics.Interval(-0.2, -0.3, -0.1), higher=False)
      'ours'
      >>> ahead(statistics.Interval(0.1, -0.1, 0.3), higher=True)
      'nobody'
    """
    if difference.low is None or difference.low <= 0 <= difference.high:
        return "nobody"
    return "ours" if (difference.mean > 0) == higher else "theirs"


def link(name: str) -> str:
    """A link to a file of results, from README.md."""
    return f"[{name}]({FOLDER}/{name}.json)"


def markdown(headlines: tuple[Duel | Ratio, ...], results: Results) -> str:
    """The table of README.md."""
    rows = [headline.row(results) for headline in headlines]
    return "\n".join(printing.markdown_table(HEAD, rows)) + "\n"


_MUON_ON_TEXT = "muon:momentum=0.95,b2=0.95,decays_all=True"

HEADLINES: tuple[Duel | Ratio, ...] = (
    Duel(
        "Fashion-MNIST, MLP 512×2, ten passes",
        "table-whitening-long",
        "spectral_muon:rank=16",
        "adamw",
        "accuracy",
    ),
    Duel(
        "The same, two passes",
        "table-whitening",
        "spectral_muon",
        "muon:momentum=0.95",
    ),
    Duel(
        "The same, five passes, AdamW's best of two, five and ten",
        "table-whitening-five",
        "spectral_muon:rank=16",
        "adamw",
        view="loss",
    ),
    Duel(
        "MLP 1024×2, five passes, AdamW's best of three, five and ten",
        "table-whitening-wide-five",
        "spectral_muon:rank=16",
        "adamw",
        view="loss",
    ),
    Duel(
        "The same, all of the five passes, 64 columns",
        "table-whitening-wide-five",
        "spectral_muon",
        "adamw",
    ),
    Duel(
        "A part of CIFAR-10, a small CNN, two passes",
        "table-cifar10",
        "spectral_muon",
        "adamw",
        "accuracy",
    ),
    Duel(
        "Bytes, Transformer of width 128, 2,000 steps",
        "table-text-long",
        "spectral_muon:power=0.75",
        "adamw:b2=0.95",
    ),
    Duel(
        "The same",
        "table-text-long",
        "spectral_muon:power=0.75",
        "adamw:b2=0.95",
        view="loss",
    ),
    Duel("The same, 500 steps", "table-text", "spectral_muon", _MUON_ON_TEXT),
    Duel(
        "MLP 2048×2, two passes, whitened in 128 coordinates",
        "table-coordinates-wide",
        "spectral_muon+coordinates:rank=128,refresh_every=50",
        "adamw",
        view="loss",
    ),
    Ratio(
        "Update of a 2048² kernel",
        "bench-whitening-2core-cpu",
        "Momentum, whitening and new parameters of one kernel, 2048²",
        "spectral_whitening, rank 64, every 1",
        "optax.contrib.muon",
        "mean ms",
    ),
)
