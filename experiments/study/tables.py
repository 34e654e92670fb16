"""Tables: a declaration becomes cells, cells become rows with intervals.

Every contender is searched alike (`tuning`), in the table's own budget. A column is a
metric seen in one way: `evaluations`, at as many gradient evaluations as the first
contender; `time`, in its measured time; `loss`, the time of the shortest of a
contender's own whole schedules that ends as low as the first one's mean. Rates are
chosen on validation data by the metric that the column prints.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import checks
from experiments.study import cells, rows, tuning
from experiments.study.cells import Cell, Spec, Store
from experiments.study.config import Config, what
from experiments.study.provenance import provenance
from experiments.study.rows import Entry
from experiments.study.task import Metric

VIEWS = ("evaluations", "time", "loss")
FRACTIONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of the first contender's steps
FINALISTS, CONFIRMING = 2, 3  # best points, and seeds that decide between them
SLOW, FEW = 3.0, 3  # slower than so many steps of the first: so few seeds
CLOSE = 0.03  # relative difference of two times that are called equal
ROUNDS = 3  # at finding as many steps as fit in a time


@dataclasses.dataclass(frozen=True)
class Table:
    """What is compared, and how.

    Attributes:
      title: Of the table.
      claim: What it is for, in a sentence.
      config: The run, but for its contender.
      contenders: As text; the first is the one to compare with.
      metrics: What is printed; by default the task's first.
      views: Some of `VIEWS`.
      seeds: Runs of each contender.
      tune: The axes that are searched, of the config's.
      most: How many neighbours from the default a search may go.
      trial_length: Length of the runs that search, as a share of the final runs'.
      margin: Where it is given, the table says which contenders are on the front of
        its columns; by so much, in the unit that is printed, none may be worse to
        beat another.
      minutes: The budget, on 2 cores.
      caption: What else is to be known.
    """

    title: str
    claim: str
    config: Config
    contenders: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    views: tuple[str, ...] = ("evaluations",)
    seeds: int = 5
    tune: tuple[str, ...] = ("rate",)
    most: int = tuning.MOST
    trial_length: float = 1 / 3
    margin: float | None = None
    minutes: float = 60.0
    caption: str = ""

    def __post_init__(self):
        """Checks every value."""
        checks.some("contenders", self.contenders)
        for name in self.contenders:
            self.config.with_contender(name)
        checks.some("views", self.views)
        for view in self.views:
            checks.one_of("views", view, VIEWS)
        for axis in self.tune:
            checks.one_of("tune", axis, self.config.axes)
        checks.count("seeds", self.seeds)
        checks.seed("seed with seeds", self.config.seed + self.seeds - 1)
        checks.positive("trial_length", self.trial_length)
        checks.between("trial_length", self.trial_length, 0, 1)
        checks.positive("minutes", self.minutes)
        checks.at_least("margin", self.margin, 0)

    def smoke(self) -> "Table":
        """All of its kinds of contenders and its views in seconds, without a file.

        Of contenders that differ in the values of options alone, the first is there.
        """
        kinds = {name.partition(":")[0]: name for name in reversed(self.contenders)}
        some = tuple(name for name in self.contenders if name in kinds.values())
        return dataclasses.replace(
            self, config=self.config.smoke(), contenders=some, seeds=2, most=1
        )


class Contest:
    """The cells of a table, computed as they are asked for.

    Args:
      table: The table.
      store: Where its cells are.
    """

    def __init__(self, table: Table, store: Store):
        self.table = table
        self.store = store
        self.used: dict[str, Cell] = {}
        self.trials: dict[str, list[dict[str, Any]]] = {}
        self.bases = {c: table.config.with_contender(c) for c in table.contenders}
        self.failed: dict[str, str] = {}
        self.metrics: dict[str, Metric] = {}
        self.length: int | None = None

    def chooser(self, metric: str) -> str:
        """The metric by which rates are chosen for the column of another."""
        return metric if self.metrics[metric].chooses else next(iter(self.metrics))

    def run(self, specs: Sequence[Spec]) -> list[Cell]:
        """Cells, noted for the table."""
        found = self.store.run(specs)
        self.used |= {
            spec.key: cell
            for spec, cell in zip(specs, found, strict=True)
            if not cell.failed
        }
        return found

    def begin(self) -> None:
        """Finds contenders that can't be run, metrics, and the length of a run."""
        for name, config in self.bases.items():
            try:
                task = self.store.task(config)
                steps = task.length(config).steps
            except ValueError as error:
                self.failed[name] = " ".join(str(error).split())
                continue
            self.metrics = self.metrics or dict(task.metrics)
            self.length = self.length or steps * config.evaluations
        for name in self.table.metrics if self.metrics else ():
            checks.one_of("metrics", name, self.metrics)

    def steps(self, name: str, fraction: float = 1.0) -> int:
        """Steps of a contender in a part of the table's gradient evaluations."""
        return max(1, round(self.length * fraction / self.bases[name].evaluations))

    def lengthened(self, config: Config, steps: int) -> Config:
        """A config with so many steps; those with a time keep that."""
        if config.minutes is not None:
            share = steps / self.length * config.evaluations
            return dataclasses.replace(config, minutes=config.minutes * share)
        return dataclasses.replace(config, steps=steps)

    def seeded(self, config: Config, count: int, *, timed: bool) -> list[Spec]:
        """Runs of a config, by seed."""
        first = self.table.config.seed
        return [
            Spec(dataclasses.replace(config, seed=seed), timed=timed)
            for seed in range(first, first + count)
        ]

    def tuned(self, name: str, metric: str) -> tuple[Config, bool]:
        """The best setting of a contender, and whether it is inside what was tried."""
        axes, base = self.table.tune, self.bases[name]
        full = self.lengthened(base, self.steps(name))
        if not axes:
            return full, True
        steps = self.steps(name, self.table.trial_length)
        short = self.lengthened(base, steps)
        at = lambda config, point: config.at(dict(zip(axes, point, strict=True)))
        trials = self.trials.setdefault(name, [])

        def score(points: Sequence[tuning.Point]) -> list[float]:
            configs = [at(short, point) for point in points]
            found = self.run([Spec(config, test=False) for config in configs])
            for config, cell in zip(configs, found, strict=True):
                trial = {
                    "setting": config.searched(),
                    "steps": steps,
                    "validation": cell.validation,
                    "diverged": cell.diverged,
                }
                if trial not in trials:
                    trials.append(trial)
            return [cells.merit(cell, metric, self.metrics[metric]) for cell in found]

        found = tuning.search(score, len(axes), self.table.most)
        points = [p for p in (found.best, found.second) if p is not None][:FINALISTS]
        count = min(CONFIRMING, self.table.seeds)
        timed = self.table.views != ("evaluations",)
        groups = [self.seeded(at(full, p), count, timed=timed) for p in points]
        results = self.run([spec for group in groups for spec in group])
        merits = [
            np.mean([cells.merit(c, metric, self.metrics[metric]) for c in part])
            for part in np.split(np.array(results, object), len(points))
        ]
        return at(full, points[int(np.argmin(merits))]), found.interior

    def final(self, configs: dict[str, Config]) -> dict[str, list[Cell]]:
        """All seeds of some configs, by contender; slow ones have fewer.

        Contenders alternate, so that a drift of the machine meets all alike.
        """
        seeds = self.table.seeds
        # Folds test all examples only together.
        few = seeds if self.table.config.overlap else min(FEW, seeds)
        first = self._alternating(configs, few, self.table.config.seed)
        pace = {
            name: np.mean([cell.seconds / max(1, cell.steps) for cell in found])
            for name, found in first.items()
        }
        slow = SLOW * pace.get(self.table.contenders[0], np.inf)
        rest = {name: c for name, c in configs.items() if pace[name] <= slow}
        more = self._alternating(rest, seeds - few, self.table.config.seed + few)
        return {name: first[name] + more.get(name, []) for name in configs}

    def _alternating(
        self, configs: dict[str, Config], count: int, first: int
    ) -> dict[str, list[Cell]]:
        timed = self.table.views != ("evaluations",)
        specs = [
            (name, Spec(dataclasses.replace(config, seed=seed), timed=timed))
            for seed in range(first, first + count)
            for name, config in configs.items()
        ]
        found = self.run([spec for _, spec in specs])
        groups: dict[str, list[Cell]] = {name: [] for name in configs}
        for (name, _), cell in zip(specs, found, strict=True):
            groups[name].append(cell)
        return groups


def compute(name: str, table: Table, store: Store, scale: str = "") -> dict[str, Any]:
    """Computes what is missing of a table.

    Args:
      name: Of the table.
      table: The table.
      store: Where its cells are.
      scale: As it was asked for.

    Returns:
      What `NAME.json` holds: columns, rows, trials, budget and provenance.
    """
    contest = Contest(table, store)
    contest.begin()
    columns, entries = [], []
    able = [name for name in table.contenders if name not in contest.failed]
    metrics = table.metrics or tuple(contest.metrics)[:1]
    views = table.views if table.contenders[0] in able else VIEWS[:1]
    for metric in metrics if able else ():
        tuned = {
            contender: contest.tuned(contender, contest.chooser(metric))
            for contender in able
        }
        configs = {contender: config for contender, (config, _) in tuned.items()}
        full = contest.final(configs)
        found = {
            contender: Entry(configs[contender], full[contender], inside)
            for contender, (_, inside) in tuned.items()
        }
        for view in views:
            columns.append({"view": view, "metric": metric})
            if view == "time":
                entries.append(equal_time(contest, found))
            elif view == "loss":
                entries.append(time_to_loss(contest, found, metric))
            else:
                entries.append(found)
    lines = []
    for contender in table.contenders:
        row: dict[str, Any] = {"contender": contender, "columns": []}
        if contender in contest.failed:
            row["failed"] = contest.failed[contender]
        else:
            row["columns"] = [
                rows.described(
                    found[contender],
                    found.get(table.contenders[0]),
                    column["metric"],
                    contest.metrics[column["metric"]],
                    table.seeds,
                )
                for column, found in zip(columns, entries, strict=True)
            ]
        lines.append(row)
    rows.adjust(lines)
    if table.margin is not None:
        shown = [contest.metrics[column["metric"]] for column in columns]
        rows.front(lines, shown, table.margin, table.config.overlap)
    for column in columns:
        metric = contest.metrics[column["metric"]]
        column |= {"unit": metric.unit, "higher": metric.higher}
    return {
        "name": name,
        "scale": scale,
        "title": table.title,
        "claim": table.claim,
        "caption": table.caption,
        "config": what(table.config),
        "seeds": table.seeds,
        "tuned": list(table.tune),
        "trial_length": table.trial_length,
        "margin": table.margin,
        "overlap": table.config.overlap,
        "evaluations": contest.length,
        "columns": columns,
        "rows": lines,
        "trials": contest.trials,
        "budget": {"minutes": table.minutes, "used": spent(contest)},
        **provenance(),
    }


def equal_time(contest: Contest, found: dict[str, Entry]) -> dict[str, Entry]:
    """Runs that take as long as those of the first contender, as measured."""
    name, *others = found
    budget = np.mean([cell.seconds for cell in found[name].cells])
    result = {name: found[name]}
    for other in others:
        entry = found[other]
        for _ in range(ROUNDS):
            steps = np.mean([cell.steps for cell in entry.cells])
            taken = np.mean([cell.seconds for cell in entry.cells])
            if abs(taken / budget - 1) <= CLOSE or not taken:
                break
            config = contest.lengthened(
                entry.config, max(1, round(steps * budget / taken))
            )
            specs = contest.seeded(config, len(entry.cells), timed=True)
            entry = Entry(config, contest.run(specs), entry.interior)
        off = np.mean([cell.seconds for cell in entry.cells]) / budget - 1
        note = f"{off:+.0%} of the time" if abs(off) > CLOSE else ""
        result[other] = entry._replace(note=note)
    return result


def time_to_loss(
    contest: Contest, found: dict[str, Entry], metric: str
) -> dict[str, Entry]:
    """The shortest whole schedule of each that ends as low as the first one's mean.

    Whether it does is seen on validation data.
    """
    name, *others = found
    sign = -1.0 if contest.metrics[metric].higher else 1.0
    mean = lambda entry: sign * np.mean([c.validation[metric] for c in entry.cells])
    result = {name: found[name]}
    for other in others:
        entry = found[other]
        for fraction in FRACTIONS:
            config = contest.lengthened(entry.config, contest.steps(other, fraction))
            specs = contest.seeded(config, len(entry.cells), timed=True)
            short = Entry(config, contest.run(specs), entry.interior)
            if mean(short) <= mean(found[name]):
                result[other] = short._replace(note=f"{fraction:.0%} of the steps")
                break
        else:
            result[other] = entry._replace(note="not reached")
    return result


def spent(contest: Contest) -> float:
    """Minutes of training in the cells of a table, those that tune included."""
    return sum(cell.seconds for cell in contest.used.values()) / 60
