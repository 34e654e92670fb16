"""Optimizers on small problems: `python -m experiments.suite --optimizers A B ...`.

Every problem of `experiments.problems` is a table of the engine: rates are searched for
all optimizers alike on validation data, then each runs with several seeds at as many
gradient evaluations as the first. OUT has suite.json, with all of these tables and what
they come to together, and the cells.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats

from experiments import checks, cli, process
from experiments.bench import report
from experiments.problems import PROBLEMS
from experiments.study import runs, statistics, tables
from experiments.study.cells import Store
from experiments.study.provenance import provenance
from experiments.suite_config import SuiteConfig

PROG = "experiments.suite"
LEAST = 1e-7  # losses below are alike: what float32 resolves beside 1

Values = Mapping[str, Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares optimizers on ten problems of seconds, and tests who is ahead.

    Writes OUT/suite.json and prints its tables. It goes on where it was stopped, and
    several of it may share a folder. For published results, copy the file to
    experiments/results and run experiments.render.
    """

    optimizers: tuple[str, ...] = ("adamw", "muon:momentum=0.95", "spectral_muon")
    """What is compared, as text: spectral_muon:rank=16, adam+coordinates, or the dotted
    name of a function of a learning rate, optax.lion:b1=0.8. The first gives the number
    of gradient evaluations."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Some of experiments.problems; by default all."""

    seeds: int = 3
    """Runs of each optimizer on each problem. Three are made of those whose steps take
    three times as long as the first one's."""

    tune: tuple[str, ...] = ("rate",)
    """What is searched on validation data: rate and decay."""

    most: int = 9
    """How many neighbours from its default a search may go."""

    scale: Literal["smoke", "cpu"] = "cpu"
    """smoke: a few steps of everything. cpu: seconds a run, on a laptop's core."""

    out: Path = Path("runs/suite")
    """Folder of the results and their cells."""

    def __post_init__(self):
        """Checks every value."""
        checks.some("problems", self.problems)
        for problem in self.problems:
            checks.one_of("problems", problem, PROBLEMS)
        checks.some("optimizers", self.optimizers)
        checks.count("most", self.most, 0)
        self.table(self.problems[0])

    def table(self, problem: str) -> tables.Table:
        """The comparison on a problem; a `ValueError` names an option that is wrong."""
        table = tables.Table(
            title=problem,
            claim=" ".join(
                (PROBLEMS[problem].__doc__ or "").partition("\n\n")[0].split()
            ),
            config=SuiteConfig(problem=problem),
            contenders=self.optimizers,
            seeds=self.seeds,
            tune=self.tune,
            most=self.most,
        )
        return table.smoke() if self.scale == "smoke" else table


def values(found: Mapping[str, dict[str, Any]]) -> Values:
    """Test losses by problem, optimizer and seed; those with a result have an entry.

    Args:
      found: What `study.tables.compute` gives, by problem.
    """
    return {
        problem: {
            row["contender"]: [max(x, LEAST) for x in row["columns"][0]["values"]]
            for row in result["rows"]
            if row["columns"]
        }
        for problem, result in found.items()
    }


def paired(losses: Values, one: str, other: str) -> dict[str, np.ndarray]:
    """Logarithms of the losses of an optimizer over those of another.

    Args:
      losses: From `values`.
      one: An optimizer.
      other: Another.

    Returns:
      By problem where both have results, one for each seed of both.

    Example:
      >>> paired({"saddle": {"sgd": [0.2, 0.1], "adam": [0.1]}}, "sgd", "adam")
      {'saddle': array([0.69...])}
    """
    return {
        problem: np.log([a / b for a, b in zip(by[one], by[other], strict=False)])
        for problem, by in losses.items()
        if one in by and other in by
    }


def pairs(losses: Values, optimizers: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Who is ahead of whom, paired by problem and seed.

    Seeds of one problem are no independent evidence on another problem, so the test,
    Wilcoxon's, has one number for each problem: the mean over seeds of the logarithm
    of the ratio of the losses. Its p-values are adjusted for all pairs (Holm).

    Args:
      losses: From `values`.
      optimizers: All that are compared.

    Returns:
      For each two, in both orders, how often the first and how often the second has
      the lower loss, p-value and adjusted p-value.
    """
    found: dict[tuple[str, str], Any] = {}
    couples = list(itertools.combinations(optimizers, 2))
    for one, other in couples:
        by_problem = paired(losses, one, other)
        ratios = np.concatenate([*by_problem.values(), np.zeros(0)])
        found[one, other] = {
            "wins": int((ratios < 0).sum()),
            "losses": int((ratios > 0).sum()),
            "p": statistics.signed_rank_p_value(
                [float(ratio.mean()) for ratio in by_problem.values()]
            ),
        }
    adjusted = statistics.holm([found[couple]["p"] for couple in couples])
    for (one, other), value in zip(couples, adjusted, strict=True):
        result = found[one, other] | {"holm": value}
        swapped = {"wins": result["losses"], "losses": result["wins"]}
        found[one, other], found[other, one] = result, result | swapped
    return found


def ranks(losses: Values, optimizers: Sequence[str]) -> dict[str, float]:
    """The mean over problems and seeds of the places; 1 is the lowest loss.

    Problems on which an optimizer has no result are left out for all.
    """
    places = [
        scipy.stats.rankdata(some)
        for by in losses.values()
        if all(name in by for name in optimizers)
        for some in zip(*(by[name] for name in optimizers), strict=False)
    ]
    means = np.mean(places, axis=0) if places else [float("nan")] * len(optimizers)
    return dict(zip(optimizers, map(float, means), strict=True))


def summary(
    found: Mapping[str, dict[str, Any]], optimizers: Sequence[str]
) -> report.Tables:
    """The tables of the suite, each a list of rows by its title."""
    losses = values(found)
    places, duels = ranks(losses, optimizers), pairs(losses, optimizers)

    def by_problem(shown: Callable[[dict[str, Any]], str]) -> list[dict[str, str]]:
        return [
            {"problem": problem}
            | {
                row["contender"]: (
                    shown(row["columns"][0]) if row["columns"] else "no result"
                )
                for row in result["rows"]
            }
            for problem, result in found.items()
        ]

    def duel(one: str, other: str) -> str:
        if one == other:
            return ""
        both = duels[one, other]
        p = "" if both["holm"] is None else f", p {both['holm']:.2g}"
        return f"{both['wins']} : {both['losses']}{p}"

    seeds = max((result["seeds"] for result in found.values()), default=0)
    tuned = next(iter(found.values()))["tuned"]
    minutes = sum(result["budget"]["used"] for result in found.values())
    searched = (
        f"{' and '.join(tuned)} searched on validation data for each, at the edge of "
        "what was tried where there is a *"
        if tuned
        else "nothing was tuned"
    )
    return {
        f"Test loss, mean ± 95 % interval over {seeds} seeds, lower is better; equal "
        f"gradient evaluations, {searched}; {minutes:.1f} minutes of training": [
            *by_problem(entry),
            {"problem": "mean rank"}
            | {name: f"{place:.2f}" for name, place in places.items()},
        ],
        "Problems and seeds in which the row's optimizer has the lower loss : the "
        f"column's, where not both are below {LEAST:g}; p of Wilcoxon's test of the "
        "problems, adjusted for all pairs (Holm)": [
            {"ahead of": one} | {other: duel(one, other) for other in optimizers}
            for one in optimizers
        ],
        "Rates, and milliseconds a step": by_problem(setting),
    }


def entry(column: dict[str, Any]) -> str:
    """A loss with its interval, to three digits of the loss.

    Example:
      >>> column = {"mean": 0.01234, "low": 0.0120, "high": 0.01268, "diverged": []}
      >>> entry(column | {"interior": False})
      '0.0123 ± 0.00034 *'
    """
    text = f"{column['mean']:.3g}"
    if column["low"] is not None:
        text += f" ± {(column['high'] - column['low']) / 2:.2g}"
    if column["diverged"]:
        text += f" ({len(column['diverged'])} diverged)"
    return text + " *" * (not column["interior"])


def setting(column: dict[str, Any]) -> str:
    """What was chosen, and the time of a step.

    Example:
      >>> setting({"setting": {"rate": 0.003, "decay": 0.1}, "milliseconds": 0.25})
      '0.003, 0.1; 0.25 ms'
    """
    chosen = ", ".join(f"{value:.3g}" for value in column["setting"].values())
    return f"{chosen}; {column['milliseconds']:.2g} ms"


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 without a result."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        if options.scale == "smoke":
            process.compiles_fast()
        store = Store(options.out, tell=console.print)
        found = {}
        for problem in options.problems:
            table = options.table(problem)
            console.print(f"{problem}: {table.claim}")
            found[problem] = tables.compute(problem, table, store, options.scale)
        whole = summary(found, options.optimizers)
        report.show(whole, console, None)
        path = options.out / "suite.json"
        runs.write_json(path, {**provenance(), "tables": whole, "problems": found})
        console.print(f"Written to {path}", soft_wrap=True)
    failed = [
        f"{row['contender']} on {problem}: {row['failed']}"
        for problem, result in found.items()
        for row in result["rows"]
        if row.get("failed")
    ]
    if failed:
        cli.fail(PROG, f"no result of {'; '.join(failed)}", code=1)


if __name__ == "__main__":
    main()
