"""What a result says of where it comes from, and the plots beside it."""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes

from experiments.study import provenance as source, report, runs


def provenance(arguments: Iterable[str], config: Any) -> dict[str, Any]:
    """Command, commit, config and machine of a result.

    Args:
      arguments: Those of the command.
      config: Its options, as JSON holds them.

    Returns:
      A dict for the head of a result.
    """
    words = source.without_places(arguments)
    command = shlex.join(["python", "-m", "experiments.theory", *words])
    return source.provenance() | {"command": command, "config": config}


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
        f"<h2>{title}</h2>"
        + report.html_table(list(rows[0]), [list(row.values()) for row in rows])
        for title, rows in tables.items()
    ]
    runs.write_json(files[0], result)
    runs.write_atomically(files[1], report.standalone(picture))
    runs.write_atomically(files[2], report.page(path.stem, [picture, *body]))
    return files


def check_out(path: pathlib.Path) -> None:
    """Raises a `ValueError` unless a JSON file can be written there."""
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(f"out={str(path)!r}; accepted is a file that ends in .json")
    runs.make_folder(path)


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass of options as JSON has them, without the places of its files."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
        if not isinstance(value, pathlib.Path)
    }


def kept(
    file: pathlib.Path,
    settings: dict[str, Any],
    compute: Callable[[], dict[str, Any]],
    option: str,
) -> dict[str, Any]:
    """A part of a result, from its file where there is one.

    Args:
      file: The file.
      settings: What the part depends on, as JSON has it.
      compute: Makes it.
      option: The name of the option that has the folder.

    Returns:
      The part, its settings too.

    Raises:
      ValueError: The file's settings are others.
    """
    if not file.exists():
        part = {"settings": settings} | compute()
        runs.write_json(file, part)
        return part
    part = json.loads(file.read_text(encoding="utf-8"))
    if part["settings"] != settings:
        raise ValueError(
            f"{option}={str(file.parent)!r} holds parts with {part['settings']}; "
            "accepted is another folder, or those settings"
        )
    return part
