"""Trains a classifier: `python -m experiments.train [PRESET] [--options]`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from experiments import cli, data, runs
from experiments.config import DataConfig
from experiments.loop import Diverged, make_trainer, run_experiment
from experiments.report import closing_table, write_report

PROG = "experiments.train"


@dataclasses.dataclass(frozen=True)
class Train(cli.Command):
    """Trains a classifier from a preset, with any option of it replaced.

    Writes the folder OUT/NAME with config.json, metrics.jsonl, checkpoints/ and
    report.html, and prints a table.
    """

    name: str | None = None
    """Name of the run. By default PRESET-OPTIMIZER-seedN, with a number added where
    that is taken."""

    out: Path = Path("runs")
    """Folder of all runs."""

    resume: bool = False
    """Go on with the run of that name, or with the latest of the default name."""

    overwrite: bool = False
    """Replace the run of that name."""


@cli.single_threaded_lapack
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 on divergence."""
    args = list(sys.argv[1:] if args is None else args)
    console = Console(highlight=False)
    with cli.user_errors(PROG):
        command = cli.parse(Train, args, PROG)
        run = find_run(command, args) if command.resume else None
    if run is None or run.result() is None:
        with cli.user_errors(PROG):
            # The folder is claimed when nothing can be wrong with the rest.
            config = command.config if run is None else run.config
            trainer = make_trainer(load_data(config.data), config)
            run = run or runs.start(
                command.out,
                command.name,
                command.preset,
                config,
                overwrite=command.overwrite,
            )
        try:
            with progress_bar(console) as progress:
                run_experiment(run, trainer, progress)
        except Diverged as error:
            if run.records():
                write_report(run)
            cli.fail(PROG, error, code=1)
        except KeyboardInterrupt:
            hint = f"--resume --name {run.path.name} --out {run.path.parent}"
            cli.fail(PROG, f"interrupted; {hint} goes on", code=130)
    write_report(run)
    console.print(closing_table(run))
    console.print(f"report: {run.path / 'report.html'}", soft_wrap=True)


def find_run(command: Train, args: Sequence[str]) -> runs.Run:
    """The run to go on with.

    Options that are not given are those of the run; those given must agree with it,
    but for the place of the data.
    """
    if command.overwrite:
        raise ValueError("resume=True with overwrite=True; accepted is one of them")
    base = runs.default_name(command.preset, command.config)
    run = runs.find(command.out, command.name, base)
    config = cli.parse_over(Train, args, PROG, run.config).config
    runs.check_unchanged(config, run.config)
    return dataclasses.replace(run, config=config)


def load_data(config: DataConfig) -> data.Dataset:
    """Loads the data set that a config names."""
    dataset = data.load(
        config.name,
        data_dir=config.data_dir,
        download=config.download,
        seed=config.split_seed,
    )
    return data.with_label_noise(dataset, config.label_noise, seed=config.split_seed)


def progress_bar(console: Console) -> Progress:
    """A progress bar where someone is looking, and nothing where not."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    main()
