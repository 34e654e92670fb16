"""The folder of a run: claimed once, written line by line, never lost silently.

runs/<name>/config.json     what was run, with the versions it ran on
            metrics.jsonl   one line per evaluation, the test result last
            checkpoints/    the state after each evaluation
            report.html     plots
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.study.config import PLACES, Config, differences, with_places
from experiments.study.provenance import provenance, usable_cores as usable_cores


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
      path: The folder.
      config: What is run.
      preset: The preset that it came from.
    """

    path: Path
    config: Any
    preset: str

    @property
    def metrics_path(self) -> Path:
        """The file of `records`."""
        return self.path / "metrics.jsonl"

    def log(self, record: dict[str, Any]) -> None:
        """Appends a record to the metrics, through to the disk."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """The records so far; a line cut off by a kill is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        text = self.metrics_path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def truncate(self, step: int | None) -> None:
        """Drops what was logged after a step; with None, everything.

        The test result is dropped as well: the run that goes on logs it again.
        """
        kept = [
            record
            for record in self.records()
            if step is not None and record["step"] <= step and "finished" not in record
        ]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.metrics_path, lines)

    def result(self) -> dict[str, Any] | None:
        """The last record, that of the test, where the run is complete."""
        return next((r for r in self.records() if "finished" in r), None)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file of UTF-8, whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def default_name(preset: str, config: Any) -> str:
    """The name of a run that was given none."""
    return f"{Path(preset).stem}-{config.label}-seed{config.seed}"


def start(
    out: Path, name: str | None, preset: str, config: Any, *, overwrite: bool
) -> Run:
    """Claims the folder of a new run.

    Args:
      out: The folder of all runs.
      name: The name of the run. Without one, the default name, with the first
        number that is free where it is taken.
      preset: The preset of the run.
      config: What will be run.
      overwrite: Replace a run of that name.

    Returns:
      The run; its `config.json` is written.

    Raises:
      ValueError: If the name is taken, or no folder can be made there.
    """
    base = default_name(preset, config)
    path = claim(out, name, base, overwrite=overwrite)
    described = {"preset": preset, "config": with_places(config), **provenance()}
    write_json(path / "config.json", described)
    return Run(path, config, preset)


def claim(out: Path, name: str | None, base: str, *, overwrite: bool) -> Path:
    """Makes a folder that nothing else has.

    Args:
      out: Where.
      name: Its name. Without one, `base`, with the first number that is free where
        that is taken.
      base: The default name.
      overwrite: Remove the run that has the name.

    Returns:
      The empty folder.

    Raises:
      ValueError: If the name is taken, or no folder can be made there.
    """
    numbered, base = name is None, base if name is None else name
    check_name(base, out)
    make_folder(out / base)
    if overwrite:
        _remove(out / base)
    number = 1
    while True:
        path = out / (base if number == 1 else f"{base}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            if not numbered:
                raise ValueError(
                    f"name={base!r}; {path} exists: accepted are a new name, --resume "
                    "to go on with it, or --overwrite to replace it"
                ) from None
            number += 1
        except OSError as error:
            raise ValueError(f"out={str(out)!r}; {error}") from None
        else:
            return path


def check_name(name: str, out: Path) -> None:
    """Raises a `ValueError` unless a name is that of a folder under `out`."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"name={name!r}; accepted are names of a folder under {out}")


def make_folder(path: Path) -> None:
    """Makes the folder that a file or folder will lie in.

    Args:
      path: What will lie in it.

    Raises:
      ValueError: If there can be no such folder, or nothing can be written there.
    """
    try:
        str(path.absolute()).encode()  # as checkpoints and reports hold it
        path.parent.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        raise ValueError(
            f"out={str(path)!r}; accepted are names that the locale can decode, or "
            "PYTHONUTF8=1 in the environment"
        ) from None
    except OSError as error:
        raise ValueError(f"out={str(path.parent)!r}; {error}") from None
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Raises a `ValueError` where nothing can be written in a folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"out={str(folder)!r}; accepted are folders that can be written in: "
            f"{error.strerror}"
        ) from None


def _remove(path: Path) -> None:
    """Deletes a run, and nothing that is not one."""
    if not path.exists():
        return
    if not (path / "config.json").is_file():
        raise ValueError(
            f"overwrite=True; {path} holds no config.json, so it is no run: "
            "accepted is to remove it by hand"
        )
    shutil.rmtree(path)


def find(out: Path, name: str | None, base: str, read: Callable[[Any], Config]) -> Run:
    """Opens the folder of a run that was started before.

    Args:
      out: The folder of all runs.
      name: The name of the run. Without one, the latest of those called `base`.
      base: The default name.
      read: From JSON to the config.

    Returns:
      The run, with the config it was started with.

    Raises:
      ValueError: If there is no such run, or its `config.json` cannot be read.
    """
    if name is None:
        folders = out.iterdir() if out.is_dir() else ()
        same = [p for p in folders if _number(p.name, base) is not None]
        path = max(same, key=lambda p: _number(p.name, base), default=out / base)
    else:
        path = out / name
    file = path / "config.json"
    if not file.is_file():
        started = sorted(p.parent.name for p in out.glob("*/config.json"))
        accepted = ", ".join(started) or "none: no run was started yet"
        raise ValueError(
            f"name={path.name!r}; there is no run to resume; accepted are {accepted}"
        )
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        run = Run(path, read(described["config"]), described["preset"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"name={path.name!r}; cannot read {file}: {error}") from None
    check_writable(path)
    return run


def _number(name: str, base: str) -> int | None:
    """The number of a default name: 1 without a suffix; None for other names."""
    if name == base:
        return 1
    suffix = name.removeprefix(base + "-")
    return int(suffix) if suffix != name and suffix.isdecimal() else None


def check_unchanged(new: Config, old: Config) -> None:
    """Raises a `ValueError` where a resumed run would become another experiment."""
    changed = {k: v for k, v in differences(new, old).items() if k not in PLACES}
    for field, (value, before) in changed.items():
        raise ValueError(
            f"{field}={value!r}; the run was started with {before!r}: accepted are "
            "that value, or a new run without --resume"
        )
