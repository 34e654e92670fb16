"""Runs benchmarks by name: `python -m experiments.bench NAME`."""

import dataclasses
import datetime
import json
import pathlib
import platform
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import process, runs
from experiments.bench import accuracy, engine, meta, step, update
from experiments.bench.accuracy import AccuracyConfig
from experiments.bench.meta import MetaConfig
from experiments.bench.step import StepConfig
from experiments.bench.update import UpdateConfig

# The engine is measured with LAPACK's threads, which its peers need: `eigh` and `svd`
# of large matrices are a third slower without them. Updates choose for themselves.
BENCHMARKS = {
    "engine": lambda options: engine.run(),
    "update": lambda options: update.run(options.update),
    "step": process.single_threaded_lapack(lambda options: step.run(options.step)),
    "accuracy": process.single_threaded_lapack(
        lambda options: accuracy.run(options.accuracy)
    ),
    "meta": process.single_threaded_lapack(lambda options: meta.run(options.meta)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Prints the tables of one benchmark, or of all."""

    name: Annotated[
        Literal["engine", "update", "step", "accuracy", "meta", "all"],
        tyro.conf.Positional,
    ] = "all"
    """Which benchmark to run."""

    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    accuracy: AccuracyConfig = dataclasses.field(default_factory=AccuracyConfig)
    meta: MetaConfig = dataclasses.field(default_factory=MetaConfig)

    out: pathlib.Path | None = None
    """Write the tables as JSON to this file as well."""


def main(options: Options) -> None:
    """Runs a benchmark and prints its tables."""
    console = Console()
    if not console.is_terminal:  # a file has room for every column
        console.width = 160
    tables = {}
    for name in BENCHMARKS if options.name == "all" else [options.name]:
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
        device = jax.devices()[0]
        record = {
            "date": datetime.date.today().isoformat(),
            "device": f"{device.device_kind} ({device.platform})",
            "cores": runs.usable_cores(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "tables": tables,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
