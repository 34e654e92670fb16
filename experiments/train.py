"""Trains once: `python -m experiments.train [PRESET] [--options]`.

PRESET is a file of configs/ by name, or the path of another such file: images (digits,
fashion_mnist, ...), few-shot tasks (sine, omniglot, cifar_fs), or text.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli, process, tasks
from experiments.study import loop, report, runs

PROG = "experiments.train"


@dataclasses.dataclass(frozen=True)
class Train(cli.Command):
    """Trains from a preset, with any option of it replaced.

    Writes the folder OUT/NAME with config.json, metrics.jsonl, checkpoints/ and
    report.html, and prints a table.
    """

    name: str | None = None
    """Name of the run. By default PRESET-LABEL-seedN, LABEL what is compared (the
    optimizer, the method), with a number added where that is taken."""

    out: Path = Path("runs")
    """Folder of all runs."""

    resume: bool = False
    """Go on with the run of that name, or with the latest of the default name."""

    overwrite: bool = False
    """Replace the run of that name."""


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 on divergence."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console()
    with cli.user_errors(PROG):
        command = cli.parse(Train, args, PROG)
        run = find_run(command, args) if command.resume else None
        # Whatever can be wrong with the config is found before a folder is claimed.
        task = make_task(command.config if run is None else run.config)
        if run is None:
            run = runs.start(
                command.out,
                command.name,
                command.preset,
                command.config,
                overwrite=command.overwrite,
            )
    if run.result() is None:
        try:
            with cli.progress_bar(console) as progress:
                total = task.length(run.config).steps
                bar = progress.add_task(run.path.name, total=total)
                loop.run(run, task, advance=lambda n: progress.advance(bar, n))
        except loop.Diverged as error:
            if run.records():
                report.write(run, task)
            cli.fail(PROG, error, code=1)
        except KeyboardInterrupt:
            hint = f"--resume --name {run.path.name} --out {run.path.parent}"
            cli.fail(PROG, f"interrupted; {hint} goes on", code=130)
    report.write(run, task)
    console.print(report.closing_table(run, task))
    console.print(f"report: {run.path / 'report.html'}", soft_wrap=True)


def make_task(config: tasks.Config) -> tasks.Task:
    """The task of a config, whose length was checked."""
    task = config.make()
    task.length(config)
    return task


def find_run(command: Train, args: Sequence[str]) -> runs.Run:
    """The run to go on with.

    Options that are not given are those of the run; those given must agree with it,
    but for the place of the data.
    """
    if command.overwrite:
        raise ValueError("resume=True with overwrite=True; accepted is one of them")
    base = runs.default_name(command.preset, command.config)
    run = runs.find(command.out, command.name, base, tasks.read)
    options = args[bool(args) and not args[0].startswith("-") :]
    config = cli.parse_over(Train, options, PROG, run.config, command.preset).config
    runs.check_unchanged(config, run.config)
    return dataclasses.replace(run, config=config)


if __name__ == "__main__":
    main()
