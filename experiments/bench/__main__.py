"""Runs benchmarks by name: `python -m experiments.bench NAME`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.table import Table

from experiments import cli, process
from experiments.bench import compilation, engine, meta, step, update, whitening
from experiments.bench.compilation import CompileConfig
from experiments.bench.meta import MetaConfig
from experiments.bench.step import StepConfig
from experiments.bench.update import UpdateConfig
from experiments.bench.whitening import WhiteningConfig
from experiments.study import runs
from experiments.study.provenance import provenance

PROG = "experiments.bench"

# The engine is measured with LAPACK's threads, which its peers need: `eigh` and `svd`
# of large matrices are a third slower without them. Updates choose for themselves.
BENCHMARKS = {
    "engine": lambda options: engine.run(),
    "update": lambda options: update.run(options.update),
    "whitening": lambda options: whitening.run(options.whitening),
    "compile": process.single_threaded_lapack(
        lambda options: compilation.run(options.compile)
    ),
    "step": process.single_threaded_lapack(lambda options: step.run(options.step)),
    "meta": process.single_threaded_lapack(lambda options: meta.run(options.meta)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Prints the tables of one benchmark, or of all."""

    name: Annotated[
        Literal["engine", "update", "whitening", "compile", "step", "meta", "all"],
        tyro.conf.Positional,
    ] = "all"
    """Which benchmark to run."""

    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    whitening: WhiteningConfig = dataclasses.field(default_factory=WhiteningConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    meta: MetaConfig = dataclasses.field(default_factory=MetaConfig)

    out: pathlib.Path | None = None
    """Write the tables as JSON to this file as well."""


@process.keeps_memory
def main(args: Sequence[str] | None = None) -> None:
    """Runs a benchmark and prints its tables; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        names = list(BENCHMARKS) if options.name == "all" else [options.name]
        check_files(options)
    tables = {}
    for name in names:
        tables |= BENCHMARKS[name](options)
    for title, rows in tables.items():
        table = Table(*rows[0], title=title)
        for row in rows:
            cells = (
                value if isinstance(value, str) else f"{value:.4g}"
                for value in row.values()
            )
            table.add_row(*cells)
        console.print(table)
    if options.out is not None:
        runs.write_json(options.out, {**provenance(), "tables": tables})
        console.print(f"Written to {options.out}")


def check_files(options: Options) -> None:
    """Makes the folder of the file, before hours of timing have passed.

    Raises:
      ValueError: If no such file can be written.
    """
    if options.out is not None:
        if options.out.is_dir():
            raise ValueError(
                f"out={str(options.out)!r} is a folder; accepted is a file"
            )
        runs.make_folder(options.out)


if __name__ == "__main__":
    main()
