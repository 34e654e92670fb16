"""Makes tables: `python -m experiments.tables [NAME...] [--scale SCALE] [--out DIR]`.

A table is a file of configs/tables/ with a function `table(scale)`. Without a name, all
are made. OUT has NAME.json and NAME.html of each, and the cells that they share.
"""

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import checks, cli, process
from experiments.study import report, runs, tables
from experiments.study.cells import Store

PROG = "experiments.tables"
FOLDER = cli.PRESETS / "tables"
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

    cells_only: bool = False
    """Compute cells and write no table: for further processes."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("jobs", self.jobs)


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
    table = cli.load_preset(name, FOLDER, scale, function="table", what="NAME")
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
def workers(args: Sequence[str], count: int) -> Iterator[None]:
    """Further processes that compute cells of the same tables."""
    command = [sys.executable, "-m", PROG, *args, "--jobs", "1", "--cells-only"]
    started = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)
    ]
    try:
        yield
    finally:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.wait()


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 without a result."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        names = options.names or tuple(cli.preset_names(FOLDER))
        wanted = {
            Path(name).stem: load(name, options.scale, options.data_dir)
            for name in names
        }
        checks.some("NAME", names)
        store = Store(options.out, tell=console.print)
    failed = False
    with workers(args, options.jobs - 1), cli.user_errors(PROG):
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
