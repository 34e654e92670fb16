"""Trained models on shifted data: `python -m experiments.inference [PRESET]`.

Each stream is followed once by each method: a file in the folder of the results, so
that a stopped command goes on where it was. Printed are accuracy under each shift, the
share of batches that were adapted, and how far each layer drifted.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tyro

from experiments import checks, cli, data, process, shifted_rivals
from experiments.bench import report
from experiments.bench.timing import interleave
from experiments.data.corruptions import corrupt
from experiments.data.streams import SETTINGS
from experiments.shifted_config import METHODS, ShiftedConfig
from experiments.study import runs, statistics
from experiments.study.config import what
from experiments.study.provenance import provenance
from experiments.tasks import shifted

PROG = "experiments.inference"
WINDOW = 10_000  # images of a long stream
_MISSED = 0.01  # of the bounds of all its windows
_TIMED = 30  # passes of each model, interleaved
_STREAM = ("setting", "batch", "severity", "method")


@dataclasses.dataclass(frozen=True)
class Inference(cli.Command):
    """Follows streams of corrupted images with methods of test-time adaptation.

    Writes a file for each method, stream and seed into OUT, and prints tables.
    """

    preset: tyro.conf.Suppress[str] = "shifted"

    methods: tuple[str, ...] = ("none", "spectral")
    """Of experiments.shifted_rivals; differences are to the first."""

    settings: tuple[str, ...] = ("continual",)
    """reset, continual, gradual, mixed, correlated, return and clean."""

    batches: tuple[int, ...] = (200,)
    """Images at a time."""

    severities: tuple[int, ...] = (5,)
    """From 1 to 5."""

    seeds: int = 1
    """Models and streams, from --seed on."""

    cost: bool = False
    """Measure what a batch costs beside the plain model, and the bytes kept."""

    out: Path = Path("runs/inference")
    """Folder of the results."""


def cells(command: Inference) -> list[ShiftedConfig]:
    """What is asked for, seed by seed."""
    return [
        dataclasses.replace(
            command.config,
            seed=command.config.seed + seed,
            method=method,
            setting=setting,
            stream_batch=size,
            severity=severity,
        )
        for seed in range(command.seeds)
        for method in command.methods
        for setting in command.settings
        for size in command.batches
        for severity in command.severities
    ]


def stem(command: Inference, config: ShiftedConfig) -> str:
    """The name of a cell's files."""
    named = (
        *(Path(command.preset).stem, config.setting, config.severity),
        *(config.stream_batch, config.images, config.repeats),
        *(config.method, config.seed),
    )
    return "-".join(map(str, named))


def delays(config: ShiftedConfig, found: shifted.Outcome) -> dict[str, int | None]:
    """Images under each shift until there is an alarm; None where there is none."""
    result: dict[str, int | None] = {}
    size = config.stream_batch
    for at, name in enumerate(found.names):
        own = np.flatnonzero(found.shift[::size] == at)
        alarms = [bool(found.seen[i].get("alarm")) for i in own]
        if len(own):
            result[name] = size * (alarms.index(True) + 1) if any(alarms) else None
    return result


def described(config: ShiftedConfig, found: shifted.Outcome) -> dict[str, Any]:
    """A cell, as JSON."""
    size = config.stream_batch
    whole = len(found.right) // WINDOW * WINDOW
    result = {
        "config": what(config),
        "accuracy": float(found.right.mean()),
        "shifts": found.by_shift(),
        "windows": found.right[:whole].reshape(-1, WINDOW).mean(axis=1).tolist(),
        "images": len(found.right),
        **provenance(),
    }
    if found.seen[0]:
        first = found.shift[::size][: len(found.seen)]
        mean = lambda key, own: float(np.mean([found.seen[i][key] for i in own]))
        result["adapted"] = mean("adapted", range(len(found.seen)))
        result["alarms"] = mean("alarm", range(len(found.seen)))
        result["delays"] = delays(config, found)
        result["drift"] = {
            name: {
                "score": mean("score", own),
                "adapted": mean("adapted", own),
                "measures": np.mean(
                    [found.seen[i]["measures"] for i in own], axis=0
                ).tolist(),
            }
            for at, name in enumerate(found.names)
            if len(own := np.flatnonzero(first == at))
        }
    return result


def compute(command: Inference, tell: Any) -> dict[str, dict[str, Any]]:
    """All cells, computed where they are missing."""
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {}
    for config in cells(command):
        name = stem(command, config)
        file = command.out / f"{name}.json"
        if not file.exists():
            key = f"{config.seed}"
            if made.get("seed") != key:
                made = {"seed": key, "model": shifted.deployed(config)}
            if config.method not in made:
                method = shifted_rivals.build(config.method, made["model"])
                made[config.method] = method
            outcome = shifted.follow(
                config, made["model"], made[config.method], "test", config.images
            )
            np.save(file.with_suffix(".npy"), np.packbits(outcome.right))
            runs.write_json(file, described(config, outcome))  # last: then it is whole
            tell(f"{name}: {100 * outcome.right.mean():.2f} %")
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def costs(command: Inference) -> dict[str, Any]:
    """Times of a batch, plain and moved, interleaved; and bytes kept."""
    config = command.config
    model = shifted.deployed(config)
    source = shifted_rivals.source_of(model)
    none, ours = (
        shifted_rivals.build("none", model),
        shifted_rivals.spectral(model, source),
    )
    result: dict[str, Any] = {"config": what(config), **provenance()}
    images = model.dataset.test.images[: config.stream_batch]
    for name in ("clean", "contrast"):
        shown = corrupt(images, name, config.severity)
        x = jnp.asarray(data.normalize(shown, model.dataset))
        _, state = ours.step(ours.init(), x)
        _, state = ours.step(state, x)
        passes = {
            "none": lambda x=x: none.step((), x)[0],
            "spectral": lambda x=x, state=state: ours.step(state, x)[0],
        }
        seconds = interleave(passes, _TIMED)
        medians = {key: float(np.median(found)) for key, found in seconds.items()}
        result[name] = medians | {
            "ratio": medians["spectral"] / medians["none"],
            "adapted": bool(state.adapted),
        }
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    kept = {"model": model.arrays, "source": source, "state": ours.init()}
    return result | {"bytes": {name: size(tree) for name, tree in kept.items()}}


Rows = list[dict[str, str]]


def table(command: Inference, found: dict[str, dict[str, Any]]) -> Rows:
    """Means over seeds; beside them the difference to the first method."""
    of: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for config in cells(command):
        key = config.setting, config.stream_batch, config.severity, config.method
        of.setdefault(key, []).append(found[stem(command, config)])
    rows = []
    for key, own in of.items():
        accuracies = [100 * one["accuracy"] for one in own]
        base = [100 * one["accuracy"] for one in of[*key[:3], command.methods[0]]]
        change = statistics.interval(np.subtract(accuracies, base))
        half = "" if change.half is None else f"±{change.half:.2f}"
        adapted = [one["adapted"] for one in own if "adapted" in one]
        rows.append(
            {
                **dict(zip(_STREAM, map(str, key), strict=True)),
                "accuracy": f"{np.mean(accuracies):.2f}",
                "difference": f"{change.mean:+.2f}{half}",
                "adapted": f"{np.mean(adapted):.0%}" if adapted else "",
            }
        )
    return rows


def by_shift(command: Inference, found: dict[str, dict[str, Any]]) -> Rows:
    """Accuracy under each shift, by method, in the first setting."""
    of: dict[str, list[dict[str, float]]] = {}
    for config in cells(command):
        first = command.settings[0], command.batches[0], command.severities[0]
        if (config.setting, config.stream_batch, config.severity) == first:
            of.setdefault(config.method, []).append(found[stem(command, config)])
    names = next(iter(of.values()))[0]["shifts"]
    mean = lambda method, name: np.mean([one["shifts"][name] for one in of[method]])
    return [
        {"shift": name} | {method: f"{100 * mean(method, name):.2f}" for method in of}
        for name in names
    ]


def drifts(found: dict[str, dict[str, Any]]) -> Rows:
    """The drift of the first cell that has it: three measures of each layer."""
    cell = next((one for one in found.values() if "drift" in one), {"drift": {}})
    return [
        {
            "shift": name,
            "score": f"{own['score']:.1f}",
            "adapted": f"{own['adapted']:.0%}",
            **{
                f"layer{at}": "/".join(f"{value:.2f}" for value in row)
                for at, row in enumerate(own["measures"], 1)
            },
        }
        for name, own in cell["drift"].items()
    ]


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


def summary(command: Inference) -> dict[str, Any]:
    """All cells of a preset that lie in the folder, for `experiments.render`."""
    preset = Path(command.preset).stem
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for file in sorted(command.out.glob(f"{preset}-*-*-*-*-*-*-*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        own = cell["config"]
        names = ("setting", "stream_batch", "severity", "images", "repeats", "method")
        key = (*(own[name] for name in names[:-1]), own["method"])
        if own["repeats"] > 1:
            bits = np.load(file.with_suffix(".npy"))
            cell["right"] = np.unpackbits(bits)[: cell["images"]].astype(np.int8)
        found.setdefault(key, {})[own["seed"]] = cell
    rows, windows = [], []
    for key, cells in found.items():
        *stream, method = key
        base = found.get((*stream, "none"), {})
        seeds = sorted(cells.keys() & base.keys())
        if not seeds:
            continue
        gains = [100 * (cells[s]["accuracy"] - base[s]["accuracy"]) for s in seeds]
        change = statistics.interval(gains)
        adapted = [cells[s]["adapted"] for s in seeds if "adapted" in cells[s]]
        shown = lambda value: "" if value is None else value
        rows.append(
            {
                **dict(zip(("setting", "batch", "severity"), stream[:3], strict=True)),
                "images": cells[seeds[0]]["images"],
                "method": method,
                "accuracy": 100 * float(np.mean([cells[s]["accuracy"] for s in seeds])),
                "gain": change.mean,
                "low": shown(change.low),
                "high": shown(change.high),
                "adapted": float(np.mean(adapted)) if adapted else "",
                "seeds": len(seeds),
            }
        )
        if stream[-1] > 1:
            change = np.concatenate(
                [cells[s]["right"] - base[s]["right"] for s in seeds]
            )
            gains, bounds = in_windows(100 * change.reshape(len(seeds), -1))
            if not gains:
                continue
            windows.append(
                {
                    "method": method,
                    "windows": len(gains),
                    "worst gain": min(gains),
                    "worst bound": min(bounds),
                    "mean gain": float(np.mean(gains)),
                    "last gain": gains[-1],
                }
            )
    title = f"{preset}: accuracy on streams of corrupted images, %"
    tables = {title: rows, f"{preset}: a long stream, windows of {WINDOW:,}": windows}
    for file in sorted(command.out.glob(f"{preset}-cost-*.json")):
        cost = json.loads(file.read_text(encoding="utf-8"))
        tables[f"{preset}: seconds of a batch"] = [
            {"images": name, **cost[name]} for name in ("clean", "contrast")
        ]
        tables[f"{preset}: bytes"] = [cost["bytes"]]
    made = provenance()
    machine = {key: made["ran_on"][key] for key in ("device", "cores", "jax")}
    return {"tables": tables, **machine, "date": made["date"], "commit": made["commit"]}


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        command = cli.parse(Inference, args, PROG)
        if not isinstance(command.config, ShiftedConfig):
            raise ValueError(
                f"PRESET={command.preset!r}; accepted are presets of a ShiftedConfig"
            )
        checks.some("methods", command.methods)
        for argument, accepted in (("methods", METHODS), ("settings", SETTINGS)):
            for value in getattr(command, argument):
                checks.one_of(argument, value, accepted)
        for method in command.methods:
            shifted_rivals.check(method, command.config.model.name)
        checks.count("seeds", command.seeds)
        cells(command)  # every value is checked
        runs.make_folder(command.out / "x")
        found = compute(command, console.print)
        if command.cost:
            name = f"{Path(command.preset).stem}-cost-{command.config.seed}.json"
            cost = costs(command)
            runs.write_json(command.out / name, cost)
            for name in ("clean", "contrast", "bytes"):
                console.print(f"{name}: {cost[name]}")
    page = f"{Path(command.preset).stem}-summary.json"
    runs.write_json(command.out / page, summary(command))
    tables = {
        "accuracy, %": table(command, found),
        "accuracy by shift, %": by_shift(command, found),
        "drift: mean/angle/spectrum": drifts(found),
    }
    report.show({name: rows for name, rows in tables.items() if rows}, console, None)


if __name__ == "__main__":
    main()
