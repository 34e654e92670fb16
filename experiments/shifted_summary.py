"""What all streams of a preset came to: accuracy, alarms, seconds and bytes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from experiments.study import statistics
from experiments.study.provenance import provenance

WINDOW = 10_000  # images of a long stream
_MISSED = 0.01  # of the bounds of all its windows


class Stream(NamedTuple):
    """A method on a stream, as its config names both."""

    setting: str
    stream_batch: int
    severity: int
    images: int
    repeats: int
    method: str


def in_windows(change: np.ndarray) -> tuple[list[float], list[float]]:
    """Means of windows, and under them bounds that hold for all windows at once.

    Args:
      change: What each image gains, shape `(seeds, images)`.

    Returns:
      Of each window the mean, and the one-sided bound of 99 %, shared out among the
      windows (Bonferroni): of the choice of images, taken as independent, for these
      models and this order.
    """
    count = change.shape[1] // WINDOW
    if not count:
        return [], []
    windows = change[:, : count * WINDOW].reshape(len(change), count, WINDOW)
    windows = windows.swapaxes(0, 1).reshape(count, -1)
    means = windows.mean(axis=1)
    width = scipy.stats.norm.ppf(1 - _MISSED / count)
    errors = windows.std(axis=1, ddof=1) / np.sqrt(windows.shape[1])
    return means.tolist(), (means - width * errors).tolist()


Cells = dict[Stream, dict[int, dict[str, Any]]]
Rows = list[dict[str, Any]]


def read(preset: str, folder: Path) -> Cells:
    """All cells of a preset in a folder: by stream and method, then by seed."""
    found: Cells = {}
    for file in sorted(folder.glob(f"{preset}-*-*-*-*-*-*-*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        own = cell["config"]
        if own["repeats"] > 1:
            bits = np.load(file.with_suffix(".npy"))
            cell["right"] = np.unpackbits(bits)[: cell["images"]].astype(np.int8)
        key = Stream(*(own[name] for name in Stream._fields))
        found.setdefault(key, {})[own["seed"]] = cell
    return found


def _plain(found: Cells, key: Stream) -> dict[int, dict[str, Any]]:
    """The same stream without adaptation, by the seeds that both have."""
    base = found.get(key._replace(method="none"), {})
    return {seed: base[seed] for seed in sorted(found[key].keys() & base.keys())}


def accuracies(found: Cells) -> Rows:
    """Accuracy, and what a method gains over no adaptation, in points."""
    rows = []
    for key, cells in found.items():
        base = _plain(found, key)
        if not base:
            continue
        own = [cells[seed] for seed in base]
        gains = [
            100 * (cells[seed]["accuracy"] - base[seed]["accuracy"]) for seed in base
        ]
        change = statistics.interval(gains)
        adapted = [one["adapted"] for one in own if "adapted" in one]
        shown = lambda value: "" if value is None else value
        rows.append(
            {
                "setting": key.setting,
                "batch": key.stream_batch,
                "severity": key.severity,
                "images": own[0]["images"],
                "method": key.method,
                "accuracy": 100 * float(np.mean([one["accuracy"] for one in own])),
                "gain": change.mean,
                "low": shown(change.low),
                "high": shown(change.high),
                "adapted": float(np.mean(adapted)) if adapted else "",
                "seeds": len(base),
            }
        )
    return rows


def windows(found: Cells) -> Rows:
    """What a long stream gains over no adaptation, window by window."""
    rows = []
    for key, cells in found.items():
        base = _plain(found, key)
        if key.repeats == 1 or not base:
            continue
        change = [cells[seed]["right"] - base[seed]["right"] for seed in base]
        gains, bounds = in_windows(100 * np.stack(change))
        if gains:
            rows.append(
                {
                    "batch": key.stream_batch,
                    "method": key.method,
                    "windows": len(gains),
                    "first gain": gains[0],
                    "worst gain": min(gains),
                    "worst bound": min(bounds),
                    "mean gain": float(np.mean(gains)),
                    "last gain": gains[-1],
                }
            )
    return rows


def alarms(found: Cells) -> Rows:
    """How often drift is noticed, and after how many images.

    On clean images each alarm is a false one. A shift that was never noticed counts as
    noticed after all of its images.
    """
    rows = []
    for key, cells in found.items():
        noticed = [one for one in cells.values() if "delays" in one]
        if key.setting not in ("clean", "reset") or not noticed:
            continue
        delays = [delay for one in noticed for delay in one["delays"].values()]
        late = [
            one["images"] // len(one["delays"]) if delay is None else delay
            for one in noticed
            for delay in one["delays"].values()
        ]
        clean = key.setting == "clean"
        rows.append(
            {
                "stream": "clean" if clean else f"severity {key.severity}",
                "batch": key.stream_batch,
                "alarms": float(np.mean([one["alarms"] for one in noticed])),
                "shifts noticed": "" if clean else sum(d is not None for d in delays),
                "of": "" if clean else len(delays),
                "median images until then": "" if clean else float(np.median(late)),
                "seeds": len(noticed),
            }
        )
    return rows


def costs(preset: str, folder: Path) -> dict[str, Rows]:
    """Seconds of a batch, and bytes that are kept, where they were measured."""
    tables = {}
    for file in sorted(folder.glob(f"{preset}-cost-*.json")):
        cost = json.loads(file.read_text(encoding="utf-8"))
        tables[f"{preset}: seconds of a batch"] = [
            {"images": name, **cost[name]} for name in ("clean", "contrast")
        ]
        tables[f"{preset}: bytes"] = [cost["bytes"]]
    return tables


def summary(preset: str, folder: Path) -> dict[str, Any]:
    """All cells of a preset that lie in a folder, for `experiments.render`."""
    found = read(preset, folder)
    tables = {
        f"{preset}: accuracy on streams of corrupted images, %": accuracies(found),
        f"{preset}: a long stream, windows of {WINDOW:,}": windows(found),
        f"{preset}: alarms of drift": alarms(found),
        **costs(preset, folder),
    }
    commits = {cell["commit"] for cells in found.values() for cell in cells.values()}
    return {"tables": tables, "commits": sorted(commits), **provenance()}
