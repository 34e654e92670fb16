"""The engine on a task without a network: cells, and processes that share them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.study import (
    cells,
    loop,
    runs,
)
from experiments.study.cells import Spec, Store
from tests.experiments.toy import ToyConfig, ToyTask

ROOT = Path(__file__).parents[2]


def without_time(cell):
    """What must be the same, bit for bit, whatever happened on the way."""
    kept = dataclasses.asdict(cell)
    for name in ("seconds", "median", "tries", "provenance"):
        del kept[name]
    for point in kept["curve"]:
        del point["seconds"]
    return kept


def test_a_cell_is_computed_once_and_read_again(tmp_path, monkeypatch):
    store = Store(tmp_path)
    specs = [Spec(ToyConfig(seed=seed)) for seed in (0, 1)]
    first = store.run(specs)
    assert [cell.steps for cell in first] == [12, 12]
    assert first[0].test != first[1].test
    monkeypatch.setattr(loop, "run", lambda *a, **k: pytest.fail("computed again"))
    assert Store(tmp_path).run(specs) == first
    # Without the test it is another cell, of the same numbers.
    monkeypatch.undo()
    (tuning,) = store.run([Spec(ToyConfig(), test=False)])
    assert tuning.test is None
    assert tuning.validation == first[0].validation


def test_provenance_says_where_a_number_comes_from(tmp_path):
    (cell,) = Store(tmp_path).run([Spec(ToyConfig())])
    assert {"command", "commit", "date", "ran_on"} <= set(cell.provenance)
    assert {"jax", "device", "cores", "processor"} <= set(cell.provenance["ran_on"])
    assert cell.config["task"] == "ToyConfig"
    assert cell.config["rate"] == 0.01


def test_a_diverged_cell_counts_at_chance(tmp_path):
    (cell,) = Store(tmp_path).run([Spec(ToyConfig(rate=3.0))])
    assert cell.diverged == "the loss is nan at step 1; try a lower rate than 3"
    assert cell.test == cell.validation == {"error": 9.0, "share": 0.5}
    assert cells.merit(cell, "error", ToyTask.metrics["error"]) == np.inf


def test_merit_is_lower_for_the_better():
    cell = cells.Cell({}, validation={"error": 2.0, "share": 0.8})
    assert cells.merit(cell, "error", ToyTask.metrics["error"]) == 2.0
    assert cells.merit(cell, "share", ToyTask.metrics["share"]) == -0.8


def test_a_cell_without_its_data_says_why(tmp_path):
    (cell,) = Store(tmp_path).run([Spec(ToyConfig(available=False))])
    assert cell.failed == "data_dir=None; accepted is a folder"
    assert not list((tmp_path / "cells").glob("[!v]*.json"))


KILLS = 3
WORK = """
import sys
from pathlib import Path
from experiments.study import cells
from tests.experiments.toy import ToyConfig
cells.SAVE_EVERY = 0.0
pause, steps, *seeds = sys.argv[2:]
given = {"steps": int(steps), "pause": float(pause)}
config = lambda seed: ToyConfig(seed=int(seed), **given)
specs = [cells.Spec(config(seed)) for seed in seeds]
cells.Store(Path(sys.argv[1])).run(specs)
"""


def work(folder, pause, steps, *seeds, log=None):
    return subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder), *map(str, (pause, steps, *seeds))],
        cwd=ROOT,
        env=os.environ | ({"TOY_LOG": str(log)} if log else {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def ended(process):
    """Waits for the end of a process without an error."""
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.mark.slow
def test_killed_again_and_again_a_cell_ends_the_same(tmp_path):
    """It goes on from its checkpoint: no step is made much more than once."""
    reference = ToyConfig(seed=3, steps=120, pause=0.01)
    (expected,) = Store(tmp_path / "whole").run([Spec(reference)])
    log, kills = tmp_path / "log", 0
    lines = lambda: log.read_text(encoding="utf-8").count("\n") if log.exists() else 0
    while kills < KILLS:
        process, before = work(tmp_path / "cut", 0.01, 120, 3, log=log), lines()
        while lines() < before + 5 and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    process = work(tmp_path / "cut", 0.01, 120, 3, log=log)
    ended(process)
    assert kills == KILLS
    (found,) = Store(tmp_path / "cut").run([Spec(reference)])
    assert without_time(found) == without_time(expected)
    made = [int(line.split()[-1]) for line in log.read_text().splitlines()]
    assert set(made) == set(range(120))
    # After a kill it goes on where the last checkpoint was, every 4 steps, not at 0.
    assert made.count(0) < kills


def test_a_killed_cell_with_a_time_starts_over(tmp_path, monkeypatch):
    config = ToyConfig(steps=10_000, minutes=0.2 / 60, pause=0.001)
    monkeypatch.setattr(cells, "SAVE_EVERY", 0.0)
    path = tmp_path / "cells" / "work" / Spec(config).key
    store = Store(tmp_path)
    path.mkdir()
    runs.Run(path, config, "").log({"step": 4, "seconds": 99.0, "validation": {}})
    (cell,) = store.run([Spec(config)])
    assert 0.2 <= cell.seconds < 5
    assert 0 < cell.steps < 10_000


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path):
    log = tmp_path / "log"
    seeds = (0, 1, 2, 3)
    processes = [
        work(tmp_path / "out", 0.005, 40, *order, log=log) for order in (seeds, seeds)
    ]
    for process in processes:
        ended(process)
    made = log.read_text(encoding="utf-8").splitlines()
    assert len(made) == len(set(made)) == 40 * len(seeds)  # nothing twice
    specs = [Spec(ToyConfig(seed=s, steps=40, pause=0.005)) for s in seeds]
    alone = Store(tmp_path / "alone").run(specs)
    shared = Store(tmp_path / "out").run(specs)
    assert [*map(without_time, shared)] == [*map(without_time, alone)]


def test_a_cell_that_another_process_is_at_is_waited_for(tmp_path, monkeypatch):
    store, config = Store(tmp_path), ToyConfig()
    other = Store(tmp_path)
    (expected,) = Store(tmp_path / "alone").run([Spec(config)])

    def finish(seconds):
        monkeypatch.undo()
        held.__exit__(None, None, None)
        other.run([Spec(config)])

    held = other._lock(Spec(config).key)
    assert held.__enter__()
    monkeypatch.setattr(cells.time, "sleep", finish)
    (found,) = store.run([Spec(config)])
    assert without_time(found) == without_time(expected)


def test_a_disturbed_timing_is_taken_again(tmp_path, monkeypatch):
    config, store = ToyConfig(), Store(tmp_path)
    (cell,) = store.run([Spec(config)])
    slow = dataclasses.replace(cell, seconds=2.0 + 2 * cell.median * cell.steps)
    assert slow.disturbed
    runs.write_json(store.path(cell.key), dataclasses.asdict(slow))
    assert store.run([Spec(config)]) == [slow]  # nobody asks for its time
    (again,) = store.run([Spec(config, timed=True)])
    assert again.tries >= 2
    assert again.seconds <= slow.seconds
    assert without_time(again) == without_time(cell)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"config": {"task": "other"}}'])
def test_a_cell_that_cannot_be_read_is_named(text, tmp_path):
    store, spec = Store(tmp_path), Spec(ToyConfig())
    store.path(spec.key).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{spec.key}.json.*accepted is to remove it"):
        store.run([spec])


def test_a_folder_of_another_version_is_refused(tmp_path):
    Store(tmp_path)
    runs.write_json(tmp_path / "cells" / "version.json", {"format": 0})
    with pytest.raises(ValueError, match=r"version \{'format': 0\}: accepted are"):
        Store(tmp_path)


def test_the_key_tells_experiments_apart_and_places_alike():
    config = ToyConfig()
    changed = [
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, steps=13),
        dataclasses.replace(config, minutes=1.0),
        dataclasses.replace(config, rate=0.02),
    ]
    keys = {Spec(one).key for one in [config, *changed]} | {Spec(config, False).key}
    assert len(keys) == 6
