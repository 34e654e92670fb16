"""Tables of a benchmark, on the terminal and in a file."""

import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.study import runs
from experiments.study.provenance import provenance

Tables = dict[str, list[dict[str, Any]]]


def show(tables: Tables, console: Console, out: pathlib.Path | None) -> None:
    """Prints tables and writes them, with where they come from.

    Args:
      tables: Rows by title.
      console: Where they are printed.
      out: The JSON file; None for none.
    """
    for title, rows in tables.items():
        table = Table(*rows[0], title=title)
        for row in rows:
            cells = (
                value if isinstance(value, str) else f"{value:.4g}"
                for value in row.values()
            )
            table.add_row(*cells)
        console.print(table)
    if out is not None:
        runs.write_json(out, {**provenance(), "tables": tables})
        console.print(f"Written to {out}")


def check_file(out: pathlib.Path | None) -> None:
    """Makes the folder of the file, before hours of timing have passed.

    Raises:
      ValueError: If no such file can be written.
    """
    if out is not None:
        if out.is_dir():
            raise ValueError(f"out={str(out)!r} is a folder; accepted is a file")
        runs.make_folder(out)
