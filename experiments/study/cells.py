"""Cells: one config to the end, once, in a file of its own, whoever asks for it.

A cell's file is named by a hash of its config (and whether the test data were read), so
tables share what they have in common. It is written whole or not at all. Processes, on
several machines too, may share a folder: each takes what no other is at, and waits for
the rest. What is being computed holds the lock of a file, which the system releases
when the process ends, however it does. A killed cell with a budget of steps goes on
from its last checkpoint, bit for bit; one with a budget of time starts over.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import loop, runs
from experiments.study.config import Config, digest, what
from experiments.study.provenance import provenance
from experiments.study.task import Task

try:
    import fcntl
except ImportError:  # No such system: processes may do the same work, but lose none.
    fcntl = None  # type: ignore[assignment]

FORMAT = 2  # of the files
SAVE_EVERY = 20.0  # seconds between two checkpoints
DISTURBED = 1.25  # mean over median time of a step
SHORT = 1.0  # seconds: no time to speak of
TRIES = 3  # at a timing that was disturbed
TASKS = 16  # kept in memory, with their programs
POLL = 0.2  # seconds between two looks for what other processes finished


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is asked for.

    Attributes:
      config: The run.
      test: Whether the test data are read at its end.
      timed: Whether its time counts, so that it is run again where it was disturbed.
    """

    config: Config
    test: bool = True
    timed: bool = False

    @property
    def key(self) -> str:
        """The name of its file."""
        return digest([FORMAT, what(self.config), self.test])


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of it.

    Attributes:
      config: The config, as JSON without the places of its data.
      steps: Steps done.
      validation: The metrics at the end; chance for a run that diverged.
      test: Likewise, or None where the test data were not read.
      curve: Steps, seconds and metrics on validation data, at each evaluation.
      diverged: At which step the loss stopped being finite, in words, or None.
      digest: Of the task's data.
      seconds: Time of the training steps.
      median: Median time of a step.
      tries: How often its time was taken.
      provenance: Command, commit, versions, machine and date.
      failed: Why there is no result; such a cell has no file.
    """

    config: dict[str, Any]
    steps: int = 0
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    test: dict[str, float] | None = None
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    diverged: str | None = None
    digest: str = ""
    seconds: float = 0.0
    median: float = 0.0
    tries: int = 1
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs slowed some of its steps down."""
        if self.diverged or self.seconds < SHORT:
            return False
        return self.seconds > DISTURBED * self.median * self.steps

    @property
    def key(self) -> str:
        """The name of its file."""
        return digest([FORMAT, self.config, self.test is not None])


class Store:
    """A folder of cells.

    Args:
      folder: The folder.
      tell: Given a line whenever a cell is finished.

    Raises:
      ValueError: If the folder is of another version, or can't be written in.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = lambda line: None):
        self.folder = folder
        self.tell = tell
        self._tasks: dict[str, Task] = {}
        runs.make_folder(folder / "cells" / "work" / "x")
        version = folder / "cells" / "version.json"
        mine = {"format": FORMAT}
        if not version.exists():
            runs.write_json(version, mine)
        found = json.loads(version.read_text(encoding="utf-8"))
        if found != mine:
            raise ValueError(
                f"out={str(folder)!r}; its cells are of version {found}: accepted are "
                f"a new folder, or one of version {mine}"
            )

    def path(self, key: str) -> Path:
        """The file of a cell."""
        return self.folder / "cells" / f"{key}.json"

    def read(self, key: str) -> Cell | None:
        """The cell, where it is finished.

        Raises:
          ValueError: If there is a file that can't be read, or is not what its name
            says.
        """
        path = self.path(key)
        try:
            cell = Cell(**json.loads(path.read_text(encoding="utf-8")))
            found = cell.key
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cannot read {path}: {error}; accepted is to remove it"
            ) from None
        if found != key:
            raise ValueError(f"{path} holds the cell {found}; accepted is to remove it")
        return cell

    def task(self, config: Config) -> Task:
        """The compiled task of a config, shared by all that differ in numbers only."""
        key = digest(what(config.shared()))
        if key not in self._tasks:
            while len(self._tasks) >= TASKS:
                del self._tasks[next(iter(self._tasks))]
            self._tasks[key] = config.make()
        return self._tasks[key]

    def run(self, specs: Sequence[Spec]) -> list[Cell]:
        """All cells asked for: computes what is missing, waits for what others do.

        A cell whose task can't be made, for want of its data, has `failed` set.
        """
        done: dict[str, Cell] = {}
        missing = {spec.key: spec for spec in specs}
        while missing:
            before = len(done)
            for key, spec in list(missing.items()):
                cell = self._finished(spec)
                if cell is None:
                    with self._lock(key) as mine:
                        if not mine:
                            continue
                        cell = self._finished(spec)
                        while cell is None:
                            made = self._compute(spec)
                            cell = made if made.failed else self._finished(spec)
                done[key] = cell
                del missing[key]
            if missing and len(done) == before:
                time.sleep(POLL)
        return [done[spec.key] for spec in specs]

    def _finished(self, spec: Spec) -> Cell | None:
        cell = self.read(spec.key)
        if cell and spec.timed and cell.disturbed and cell.tries < TRIES:
            return None
        return cell

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[bool]:
        """Whether this process may compute a cell."""
        path = self.folder / "cells" / "work" / f"{key}.lock"
        with path.open("ab") as file:
            if fcntl is None:
                yield True
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _compute(self, spec: Spec) -> Cell:
        config, before = spec.config, self.read(spec.key)
        try:
            task = self.task(config)
            task.length(config)
        except ValueError as error:
            return Cell(what(config), failed=" ".join(str(error).split()))
        path = self.folder / "cells" / "work" / spec.key
        if config.minutes is not None or before:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(exist_ok=True)
        run = runs.Run(path, config, "")
        diverged = None
        try:
            loop.run(run, task, test=spec.test, save_every=SAVE_EVERY)
        except loop.Diverged as error:
            diverged = str(error)
        cell = summary(run, task, spec, diverged)
        if before:
            better = min(cell, before, key=lambda one: one.seconds)
            cell = dataclasses.replace(better, tries=before.tries + 1)
        runs.write_json(self.path(spec.key), dataclasses.asdict(cell))
        shutil.rmtree(path)
        self.tell(line(cell, task, config))
        return cell


def summary(run: runs.Run, task: Task, spec: Spec, diverged: str | None) -> Cell:
    """The cell of a run that has ended."""
    records = run.records()
    evaluated = [record for record in records if "validation" in record]
    values = lambda found: {name: found[name] for name in task.metrics}
    chance = {name: metric.chance for name, metric in task.metrics.items()}
    looks = np.array([look for r in evaluated for look in r["looks"]]).reshape(-1, 2)
    each = np.repeat(looks[:, 1] / looks[:, 0], looks[:, 0].astype(int))
    if diverged:
        validation, test = chance, chance if spec.test else None
    else:
        validation = values(evaluated[-1]["validation"])
        test = values(records[-1]["test"]) if spec.test else None
    return Cell(
        config=what(spec.config),
        steps=records[-1]["step"] if records else 0,
        validation=validation,
        test=test,
        curve=[
            {"step": r["step"], "seconds": r["seconds"], **values(r["validation"])}
            for r in evaluated
        ],
        diverged=diverged,
        digest=task.digest,
        seconds=records[-1]["seconds"] if records else 0.0,
        median=float(np.median(each)) if len(each) else 0.0,
        provenance=provenance(),
    )


def line(cell: Cell, task: Task, config: Config) -> str:
    """One line on how a cell went."""
    name, metric = next(iter(task.metrics.items()))
    value = cell.validation[name] * metric.scale
    setting = ", ".join(f"{key} {x:g}" for key, x in config.searched().items())
    end = f"diverged: {cell.diverged}" if cell.diverged else f"{name} {value:.4g}"
    return (
        f"{config.contender} ({setting}), seed {config.seed}: {end} after "
        f"{cell.steps} steps in {cell.seconds:.1f} s"
    )


def same_machine(cells: Sequence[Cell]) -> bool:
    """Whether the times of cells may be compared."""
    return len({json.dumps(cell.provenance["ran_on"]) for cell in cells}) <= 1


def merit(cell: Cell, name: str, metric: Any) -> float:
    """What to choose by: lower is better, infinite for a run that diverged."""
    if cell.failed or cell.diverged or not math.isfinite(cell.validation[name]):
        return math.inf
    return -cell.validation[name] if metric.higher else cell.validation[name]
