"""Compares contenders: `python -m experiments.compare [PRESET] [--options]`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import checks, cli, process
from experiments.study import printing, report, runs, tables, tuning
from experiments.study.cells import Store

PROG = "experiments.compare"


@dataclasses.dataclass(frozen=True)
class Compare(cli.Command):
    """Compares contenders of a preset, paired by seed, their rates searched alike.

    Writes the folder OUT/NAME with cells/, table.json and report.html, and prints the
    table, losing rows included. It goes on where it was stopped, and several of it may
    share a folder.
    """

    contenders: tuple[str, ...] = ()
    """What is compared, with the first: optimizers as text (dsbp:residual=0.5,rank=32,
    adam+coordinates), or methods of few-shot learning (spectral_maml:spectral.rank=8).
    By default that of the preset alone."""

    metrics: tuple[str, ...] = ()
    """What is printed: accuracy, loss, hessian; by default the task's first."""

    views: tuple[str, ...] = ("evaluations",)
    """At equal gradient evaluations (evaluations), in equal measured time (time), or
    the time to the first one's mean (loss)."""

    seeds: int = 3
    """Runs of each contender, with seeds from --seed on."""

    tune: tuple[str, ...] = ()
    """What is searched on validation data: rate and decay, or inner and outer."""

    most: int = tuning.MOST
    """How many neighbours from its default a search may go."""

    name: str | None = None
    """Name of the folder. By default compare-PRESET."""

    out: Path = Path("runs")
    """Folder of all runs."""


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 without a result."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        command = cli.parse(Compare, args, PROG)
        checks.some("contenders", command.contenders or (command.config.contender,))
        name = command.name or f"compare-{Path(command.preset).stem}"
        table = tables.Table(
            title=name,
            claim=f"Contenders on {Path(command.preset).stem}.",
            config=command.config,
            contenders=command.contenders or (command.config.contender,),
            metrics=command.metrics,
            views=command.views,
            seeds=command.seeds,
            tune=command.tune,
            most=command.most,
        )
        runs.check_name(name, command.out)
        task = command.config.make()
        task.length(command.config)
        for metric in command.metrics:
            checks.one_of("metrics", metric, task.metrics)
        store = Store(command.out / name, tell=console.print)
        result = tables.compute(name, table, store)
    folder = command.out / name
    runs.write_json(folder / "table.json", result)
    report.write_table(folder / "report.html", result)
    console.print(report.terminal(result))
    console.print(printing.notes(result))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    if any(row.get("failed") for row in result["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
