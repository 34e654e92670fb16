"""Makes tables: `python -m experiments.tables [NAME...] [--scale SCALE] [--out DIR]`.

A table is a file of configs/tables/ with a function `table(scale)`. Without a name, all
are made. OUT has NAME.json and NAME.html of each, and the cells that they share.
"""

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import checks, cli, process
from experiments.optimizers import literal
from experiments.study import report, runs, tables
from experiments.study.cells import Store

PROG = "experiments.tables"
SCALES = ("smoke", "cpu", "full")


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes the tables of configs/tables/: cells, rows with intervals, pages.

    It goes on where it was stopped. Several of it, on several machines too, may share
    a folder: each computes what no other is at.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files of configs/tables/ by name, or paths of such files; by default all."""

    scale: Literal["smoke", "cpu", "full"] = "cpu"
    """smoke: all contenders and views in seconds, without data. cpu: an hour a table
    on two cores at the most. full: as long as it takes."""

    out: Path = Path("runs/tables")
    """Folder of the tables and their cells."""

    data_dir: Path | None = None
    """Folder of the data sets."""

    jobs: int = 1
    """Processes of this machine."""

    slurm: int = 0
    """Further processes as jobs of SLURM, which must see the same folders."""

    slurm_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Their parameters as submitit names them: slurm_partition=gpu timeout_min=600."""

    cells_only: bool = False
    """Compute cells and write no table: for further processes."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("jobs", self.jobs)
        checks.count("slurm", self.slurm, 0)
        if self.slurm_options and not self.slurm:
            raise ValueError(
                f"slurm_options={' '.join(self.slurm_options)} are for jobs of SLURM; "
                f"accepted with slurm of at least 1, got slurm={self.slurm}"
            )
        for word in self.slurm_options:
            if not all(word.partition("=")):
                raise ValueError(
                    f"slurm_options={word!r}; accepted are words NAME=VALUE"
                )


def load(name: str, scale: str = "cpu", data_dir: Path | None = None) -> tables.Table:
    """The table of a file.

    Args:
      name: Of a file of `configs/tables`, or its path.
      scale: One of `SCALES`.
      data_dir: The folder of the data sets.

    Returns:
      The table.

    Raises:
      ValueError: If there is no such table, or it can't be made.
    """
    checks.one_of("scale", scale, SCALES)
    table = cli.load_table(name, scale)
    if not isinstance(table, tables.Table):
        raise ValueError(f"NAME={name!r} gives a {type(table).__name__}, no Table")
    if scale == "smoke":
        table = table.smoke()
    config = table.config
    if data_dir is not None and hasattr(config, "data"):
        data = dataclasses.replace(config.data, data_dir=data_dir)
        table = dataclasses.replace(
            table, config=dataclasses.replace(config, data=data)
        )
    return table


@contextlib.contextmanager
def workers(args: Sequence[str], options: Options) -> Iterator[None]:
    """Further processes that compute cells of the same tables.

    Raises:
      ValueError: If jobs are asked for without submitit.
    """
    command = [sys.executable, "-m", PROG, *args]
    command += ["--jobs", "1", "--slurm", "0", "--slurm-options", "--cells-only"]
    submit = submitter(command, options) if options.slurm else None
    with contextlib.ExitStack() as running:
        for _ in range(options.slurm):
            running.callback(submit().cancel)
        for _ in range(options.jobs - 1):
            worker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            running.callback(worker.wait)
            running.callback(worker.terminate)
        yield


def submitter(command: Sequence[str], options: Options) -> Callable[[], Any]:
    """What runs a command in a job of SLURM; where there is none, on this machine."""
    try:
        import submitit
    except ImportError:
        raise ValueError(
            f"slurm={options.slurm} needs submitit; accepted is 0, or after "
            "pip install 'dsbp-jax[slurm]'"
        ) from None
    executor = submitit.AutoExecutor(folder=options.out / "jobs")
    words = (word.partition("=") for word in options.slurm_options)
    executor.update_parameters(**{name: literal(value) for name, _, value in words})
    run = submitit.helpers.CommandFunction(list(command), verbose=False)
    return lambda: executor.submit(run)


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 without a result."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        if options.scale == "smoke":
            process.compiles_fast()
        names = options.names or tuple(cli.preset_names(cli.TABLES))
        wanted = {
            Path(name).stem: load(name, options.scale, options.data_dir)
            for name in names
        }
        checks.some("NAME", names)
        store = Store(options.out, tell=console.print)
    failed = False
    with cli.user_errors(PROG), workers(args, options):
        for name, table in wanted.items():
            result = tables.compute(name, table, store, options.scale)
            if options.cells_only:
                continue
            runs.write_json(options.out / f"{name}.json", result)
            report.write_table(options.out / f"{name}.html", result)
            console.print(report.terminal(result))
            failed |= any(row.get("failed") for row in result["rows"])
    if failed:
        cli.fail(PROG, "a contender has no result; its row says why", code=1)


if __name__ == "__main__":
    main()
