"""Runs benchmarks by name: `python -m experiments.bench NAME`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from experiments import cli, process
from experiments.bench import (
    compilation,
    compression,
    coordinates,
    engine,
    meta,
    report,
    step,
    tuning,
    update,
    whitening,
)
from experiments.bench.compilation import CompileConfig
from experiments.bench.compression import CutConfig
from experiments.bench.coordinates import CoordinatesConfig
from experiments.bench.meta import MetaConfig
from experiments.bench.step import StepConfig
from experiments.bench.tuning import TuningConfig
from experiments.bench.update import UpdateConfig
from experiments.bench.whitening import WhiteningConfig

PROG = "experiments.bench"

# The engine is measured with LAPACK's threads, which its peers need: `eigh` and `svd`
# of large matrices are a third slower without them. Updates choose for themselves.
BENCHMARKS = {
    "compression": process.single_threaded_lapack(
        lambda options: compression.run(options.compression)
    ),
    "engine": lambda options: engine.run(),
    "update": lambda options: update.run(options.update),
    "whitening": lambda options: whitening.run(options.whitening),
    "compile": process.single_threaded_lapack(
        lambda options: compilation.run(options.compile)
    ),
    "step": process.single_threaded_lapack(lambda options: step.run(options.step)),
    "coordinates": process.single_threaded_lapack(
        lambda options: coordinates.run(options.coordinates)
    ),
    "tuning": process.single_threaded_lapack(
        lambda options: tuning.run(options.tuning)
    ),
    "meta": process.single_threaded_lapack(lambda options: meta.run(options.meta)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Prints the tables of one benchmark, or of all."""

    name: Annotated[
        Literal[
            "engine",
            "update",
            "whitening",
            "compile",
            "step",
            "coordinates",
            "tuning",
            "compression",
            "meta",
            "all",
        ],
        tyro.conf.Positional,
    ] = "all"
    """Which benchmark to run."""

    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    whitening: WhiteningConfig = dataclasses.field(default_factory=WhiteningConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    coordinates: CoordinatesConfig = dataclasses.field(
        default_factory=CoordinatesConfig
    )
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    compression: CutConfig = dataclasses.field(default_factory=CutConfig)
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
        report.check_file(options.out)
    tables = {}
    for name in names:
        tables |= BENCHMARKS[name](options)
    report.show(tables, console, options.out)


if __name__ == "__main__":
    main()
