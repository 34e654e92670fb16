"""What a result says of where it comes from, and the plots beside it."""

import dataclasses
import datetime
import pathlib
import shlex
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes

from experiments import report, runs


def provenance(arguments: Iterable[str], config: Any) -> dict[str, Any]:
    """Command, commit, config and machine of a result.

    Args:
      arguments: Those of the command.
      config: Its options, as JSON holds them.

    Returns:
      A dict for the head of a result.
    """
    words = ["python", "-m", "experiments.theory", *arguments]
    return {
        "command": shlex.join(words),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno")),
        "date": datetime.date.today().isoformat(),
        "ran_on": runs.environment(),
        "config": config,
    }


def _git(*words: str) -> str:
    """What git says of the folder that the code lies in, or nothing."""
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def write(
    path: pathlib.Path,
    result: dict[str, Any],
    panels: Iterable[Callable[[Axes], None]],
    tables: dict[str, list[dict[str, str]]],
) -> list[pathlib.Path]:
    """Writes a result as JSON, its plots as SVG, and a page with both.

    Args:
      path: The JSON file; the others lie beside it under the same name.
      result: What was found.
      panels: Functions that draw on their axes.
      tables: Rows of text by title.

    Returns:
      The files.
    """
    picture = report.figure(panels)
    files = [path, path.with_suffix(".svg"), path.with_suffix(".html")]
    body = [
        report.section(title, "", report.html_table(rows[0], map(dict.values, rows)))
        for title, rows in tables.items()
    ]
    runs.write_json(files[0], result)
    runs.write_atomically(files[1], _standalone(picture))
    runs.write_atomically(files[2], report.page(path.stem, [picture, *body]))
    return files


def _standalone(svg: str) -> str:
    return '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n' + svg


def check_out(path: pathlib.Path) -> None:
    """Raises a `ValueError` unless a JSON file can be written there."""
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(f"out={str(path)!r}; accepted is a file that ends in .json")
    runs.make_folder(path)


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass of options, paths as text."""
    return {
        key: str(value) if isinstance(value, pathlib.Path) else value
        for key, value in dataclasses.asdict(config).items()
    }
