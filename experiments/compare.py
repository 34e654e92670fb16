"""Compares optimizers: `python -m experiments.compare [PRESET] [--options]`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from experiments import (
    checks,
    cli,
    comparison,
    config as configs,
    optimizers,
    process,
    report,
    runs,
)
from experiments.command import progress_bar
from experiments.comparison import Contender, Outcome, Row
from experiments.loop import total_steps
from experiments.steps import Classifier
from experiments.train import load_data

PROG = "experiments.compare"


@dataclasses.dataclass(frozen=True)
class Compare(cli.Command):
    """Compares optimizers at equal gradient evaluations, paired by seed.

    Writes the folder OUT/NAME with comparison.json and report.html, and prints the
    table, losing rows included.
    """

    optimizers: tuple[str, ...] = ("momentum", "sam", "dsbp")
    """The optimizers; differences and tests are against the first. With +spectral or
    +coordinates after a name its gradients come from there."""

    seeds: int = 3
    """Runs of each optimizer, with seeds from --seed on."""

    sharpness: bool = False
    """Report the top eigenvalue of the Hessian at the end: of the training loss on
    --probe.batch-size examples, found by at most --probe.hessian-steps restarts."""

    tune: bool = False
    """Choose each learning rate on the validation split, from the optimizer's grid."""

    learning_rates: tuple[float, ...] = ()
    """Learning rates to try in place of each optimizer's grid; implies --tune."""

    tune_seeds: int = 1
    """How many of the seeds choose the learning rate."""

    name: str | None = None
    """Name of the folder. By default compare-PRESET, with a number added where that is
    taken."""

    out: Path = Path("runs")
    """Folder of all runs."""

    def __post_init__(self):
        """Checks every value."""
        for name in self.optimizers:
            optimizers.named(self.config.optimizer, name)
        checks.some("optimizers", self.optimizers)
        checks.count("seeds", self.seeds)
        checks.seed("seed with seeds", self.config.seed + self.seeds - 1)
        checks.between("tune_seeds", self.tune_seeds, 1, self.seeds)
        for rate in self.learning_rates:
            checks.positive("learning_rates", rate)
        probe = self.config.probe
        if self.sharpness and not (probe.batch_size and probe.hessian_steps):
            raise ValueError(
                f"sharpness=True with probe.batch_size={probe.batch_size} and "
                f"probe.hessian_steps={probe.hessian_steps}; accepted are 1 or more"
            )


@process.keeps_memory
@process.keeps_programs
@process.single_threaded_lapack
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console()
    with cli.user_errors(PROG):
        command = cli.parse(Compare, args, PROG)
        config = command.config
        dataset = load_data(config.data)
        budget = total_steps(dataset, config)
        classifier = Classifier(dataset, config.model)
        contenders = [
            Contender(classifier, config, name, budget) for name in command.optimizers
        ]
        base = f"compare-{Path(command.preset).stem}"
        folder = runs.claim(command.out, command.name, base, overwrite=False)
    tuning: dict[str, list[Outcome]] = {}
    finals: dict[str, list[Outcome]] = {}

    def save(rows: Sequence[Row] = ()) -> None:
        described = {
            "preset": command.preset,
            "config": configs.to_json(config),
            "ran_on": runs.environment(),
            "evaluations": budget,
            "tuning": comparison.to_json(tuning),
            "runs": comparison.to_json(finals),
            "table": [row._asdict() for row in rows],
        }
        runs.write_json(folder / "comparison.json", described)

    tunes = command.tune or bool(command.learning_rates)
    grids = {
        c.name: c.grid(command.learning_rates) if tunes else () for c in contenders
    }
    seeds = range(config.seed, config.seed + command.seeds)
    with progress_bar(console) as progress:
        task = progress.add_task("compare", total=None)
        for contender in contenders:
            name, rate = contender.name, contender.config.optimizer.peak
            num_runs = len(grids[name]) * command.tune_seeds + len(seeds)
            total = num_runs * contender.num_steps * contender.cost
            progress.reset(task, description=name, total=total)
            advance = lambda evaluations: progress.advance(task, evaluations)
            if tunes:
                tuning[name] = [
                    contender.run(seed, rate, test=False, advance=advance)
                    for rate in grids[name]
                    for seed in seeds[: command.tune_seeds]
                ]
                rate = comparison.best_learning_rate(tuning[name])
            finals[name] = []
            for seed in seeds:
                outcome = contender.run(
                    seed,
                    rate,
                    test=True,
                    sharpness=command.sharpness,
                    advance=advance,
                )
                finals[name].append(outcome)
                save()
    rows = comparison.make_rows(contenders, finals, grids)
    save(rows)
    write_report(folder, rows, finals)
    console.print(table(rows, title=str(folder)))
    console.print(note(rows, budget, tuned=bool(tuning)))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    for name, outcomes in finals.items():
        for outcome in outcomes:
            if outcome.diverged:
                console.print(f"{name}, seed {outcome.seed}: {outcome.diverged}")


HEAD = (
    "optimizer",
    "rate",
    "test accuracy, %",
    "difference",
    "p",
    "Hessian",
    "time",
    "steps",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""
    return (
        row.name + (f" ({row.diverged} diverged)" if row.diverged else ""),
        f"{row.learning_rate:g}" + (" *" if row.at_edge else ""),
        _percent(row.mean, row.error),
        _percent(row.difference, row.difference_error, sign="+"),
        "" if row.p_value is None else f"{row.p_value:.3f}",
        _number(row.sharpness, row.sharpness_error),
        f"{row.seconds:.1f} s",
        str(row.steps),
    )


def _number(value: float | None, error: float | None) -> str:
    text = "" if value is None else f"{value:.3g}"
    return text + ("" if error is None else f" ± {error:.2g}")


def _percent(value: float | None, error: float | None, sign: str = "") -> str:
    text = "" if value is None else f"{100 * value:{sign}.2f}"
    return text + ("" if error is None else f" ± {100 * error:.2f}")


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for the terminal."""
    result = Table(title=title)
    for head in HEAD:
        result.add_column(head, no_wrap=True)
    for row in rows:
        result.add_row(*cells(row))
    return result


def note(rows: Sequence[Row], evaluations: int, *, tuned: bool) -> str:
    """What the table's numbers are."""
    text = (
        f"Mean ± standard error over seeds, at {evaluations} gradient evaluations a "
        f"run; difference and paired t-test against {rows[0].name}. "
    )
    if any(row.at_edge for row in rows):
        text += "* at the edge of its grid, so another rate may be better. "
    return text + (
        "Learning rates were chosen on the validation split."
        if tuned
        else "Learning rates were not tuned here (--tune does)."
    )


def write_report(
    folder: Path, rows: Sequence[Row], finals: dict[str, list[Outcome]]
) -> None:
    """Writes `report.html`."""
    body = [
        report.html_table(HEAD, [cells(row) for row in rows]),
        report.section(
            "Curves and results",
            "Left: validation accuracy over gradient evaluations, mean and standard "
            "error over seeds. Right: test accuracy at the end, a dot for each seed.",
            report.figure([_curves(finals), _dots(finals)]),
        ),
    ]
    runs.write_atomically(folder / "report.html", report.page(folder.name, body))


def _curves(finals: dict[str, list[Outcome]]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for name, outcomes in finals.items():
            whole = [np.array(o.curve) for o in outcomes if not o.diverged]
            if not whole:
                continue
            evaluations = whole[0][:, 0]
            values = np.stack([curve[:, 1] for curve in whole])
            mean = values.mean(axis=0)
            (line,) = axis.plot(evaluations, mean, marker=".", label=name)
            if len(values) > 1:
                error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
                axis.fill_between(
                    evaluations,
                    mean - error,
                    mean + error,
                    color=line.get_color(),
                    alpha=0.2,
                    lw=0,
                )
        axis.set(xlabel="gradient evaluations", ylabel="validation accuracy")
        axis.legend()

    return draw


def _dots(finals: dict[str, list[Outcome]]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for position, outcomes in enumerate(finals.values()):
            accuracies = [outcome.test["accuracy"] for outcome in outcomes]
            axis.plot([position] * len(accuracies), accuracies, "o", alpha=0.6)
            axis.plot(position, np.mean(accuracies), "k_", markersize=22)
        axis.set_xticks(range(len(finals)), list(finals))
        axis.set(ylabel="test accuracy", xlim=(-0.5, len(finals) - 0.5))

    return draw


if __name__ == "__main__":
    main()
