"""Runs benchmarks by name: `python -m experiments.bench NAME`."""

import datetime
import json
import os
import pathlib
import platform
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.bench import engine, projection

# The engine is measured with LAPACK's threads, which its peers need: `eigh` and `svd`
# of large matrices are a third slower without them.
BENCHMARKS = {
    "engine": engine.run,
    "projection": cli.single_threaded_lapack(projection.run),
}


def main(
    name: Annotated[
        Literal["engine", "projection", "all"], tyro.conf.Positional
    ] = "all",
    *,
    out: pathlib.Path | None = None,
) -> None:
    """Prints the tables of one benchmark, or of all.

    Args:
      name: Which benchmark to run.
      out: Write the tables as JSON to this file as well.
    """
    console = Console()
    tables = {}
    for benchmark in BENCHMARKS if name == "all" else [name]:
        for title, rows in BENCHMARKS[benchmark]().items():
            tables[title] = rows
            table = Table(*rows[0], title=title)
            for row in rows:
                cells = (
                    value if isinstance(value, str) else f"{value:.3g}"
                    for value in row.values()
                )
                table.add_row(*cells)
            console.print(table)
    if out is not None:
        device = jax.devices()[0]
        record = {
            "date": datetime.date.today().isoformat(),
            "device": f"{device.device_kind} ({device.platform})",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "tables": tables,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"Written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
