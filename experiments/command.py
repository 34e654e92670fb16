"""The commands that train: one run with a folder of its own, new or resumed."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from experiments import cli, runs
from experiments.loop import Diverged


@dataclasses.dataclass(frozen=True)
class RunCommand(cli.Command):
    """What a command that trains has besides its config."""

    name: str | None = None
    """Name of the run. By default PRESET-LABEL-seedN, LABEL what is compared (the
    optimizer, the method), with a number added where that is taken."""

    out: Path = Path("runs")
    """Folder of all runs."""

    resume: bool = False
    """Go on with the run of that name, or with the latest of the default name."""

    overwrite: bool = False
    """Replace the run of that name."""


def run_command(
    command_class: type[RunCommand],
    prog: str,
    args: Sequence[str] | None,
    *,
    prepare: Callable[[Any], Any],
    execute: Callable[[runs.Run, Any, Progress], None],
    write_report: Callable[[runs.Run], None],
    closing_table: Callable[[runs.Run], Table],
) -> None:
    """Runs a command; exits with code 2 on a user's error, 1 on divergence.

    Args:
      command_class: The command.
      prog: The name of the program.
      args: The arguments; by default those of the process.
      prepare: From a config to what `execute` needs; whatever can be wrong with the
        config is found here, before a folder is claimed.
      execute: Trains and tests; goes on from the last checkpoint if there is one.
      write_report: Writes the report of a run that has a record.
      closing_table: The table to print at the end.
    """
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console()
    with cli.user_errors(prog):
        command = cli.parse(command_class, args, prog)
        run = find_run(command, args, prog) if command.resume else None
    if run is None or run.result() is None:
        with cli.user_errors(prog):
            config = command.config if run is None else run.config
            prepared = prepare(config)
            run = run or runs.start(
                command.out,
                command.name,
                command.preset,
                config,
                overwrite=command.overwrite,
            )
        try:
            with progress_bar(console) as progress:
                execute(run, prepared, progress)
        except Diverged as error:
            if run.records():
                write_report(run)
            cli.fail(prog, error, code=1)
        except KeyboardInterrupt:
            hint = f"--resume --name {run.path.name} --out {run.path.parent}"
            cli.fail(prog, f"interrupted; {hint} goes on", code=130)
    write_report(run)
    console.print(closing_table(run))
    console.print(f"report: {run.path / 'report.html'}", soft_wrap=True)


def find_run(command: RunCommand, args: Sequence[str], prog: str) -> runs.Run:
    """The run to go on with.

    Options that are not given are those of the run; those given must agree with it,
    but for the place of the data.
    """
    if command.overwrite:
        raise ValueError("resume=True with overwrite=True; accepted is one of them")
    base = runs.default_name(command.preset, command.config)
    run = runs.find(command.out, command.name, base, type(command.config))
    config = cli.parse_over(type(command), args, prog, run.config).config
    runs.check_unchanged(config, run.config)
    return dataclasses.replace(run, config=config)


def progress_bar(console: Console) -> Progress:
    """A progress bar where someone is looking, and nothing where not."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
