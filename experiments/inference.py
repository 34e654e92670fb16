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
import tyro

from experiments import checks, cli, data, process, shifted_rivals, shifted_summary
from experiments.bench import report
from experiments.bench.timing import interleave
from experiments.data.corruptions import corrupt
from experiments.data.streams import SETTINGS
from experiments.shifted_config import METHODS, ShiftedConfig
from experiments.study import runs, statistics
from experiments.study.config import digest, what
from experiments.study.provenance import provenance
from experiments.tasks import shifted

PROG = "experiments.inference"
_TIMED = 30  # passes of each model, interleaved
_BEFORE = 4  # batches that the timed one comes after
_STREAM = ("setting", "batch", "severity", "method")


@dataclasses.dataclass(frozen=True)
class Inference(cli.Command):
    """Follows streams of corrupted images with methods of test-time adaptation.

    Writes a file for each method, stream and seed into OUT, and prints tables.
    """

    preset: tyro.conf.Suppress[str] = "shifted"

    methods: tuple[str, ...] = ()
    """Of experiments.shifted_rivals; differences are to the first. By default none, and
    --method."""

    settings: tuple[str, ...] = ()
    """reset, continual, gradual, mixed, correlated, return and clean; by default
    --setting."""

    batches: tuple[int, ...] = ()
    """Images at a time; by default --stream-batch."""

    severities: tuple[int, ...] = ()
    """From 1 to 5; by default --severity."""

    seeds: int = 1
    """Models and streams, from --seed on."""

    cost: bool = False
    """Measure what a batch costs beside the plain model, and the bytes kept."""

    out: Path = Path("runs/inference")
    """Folder of the results."""

    def whole(self) -> "Inference":
        """The same, with what was left to the configuration."""
        config = self.config
        return dataclasses.replace(
            self,
            methods=self.methods or tuple(dict.fromkeys(("none", config.method))),
            settings=self.settings or (config.setting,),
            batches=self.batches or (config.stream_batch,),
            severities=self.severities or (config.severity,),
        )


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
    result = {
        "config": what(config),
        "accuracy": float(found.right.mean()),
        "shifts": found.by_shift(),
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
        if digest(found[name]["config"]) != digest(what(config)):
            raise ValueError(
                f"out={str(command.out)!r} has a {file.name} of another configuration; "
                "name another folder"
            )
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
    test, size, severity = model.dataset.test, command.batches[0], command.severities[0]
    for name in ("clean", "contrast"):
        index = np.arange((_BEFORE + 1) * size).reshape(-1, size) % len(test)
        *before, x = (
            jnp.asarray(
                data.normalize(corrupt(test.images[own], name, severity), model.dataset)
            )
            for own in index
        )
        state = ours.init()
        for earlier in before:
            _, state = ours.step(state, earlier)
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
        command = command.whole()
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
    runs.write_json(
        command.out / page,
        shifted_summary.summary(Path(command.preset).stem, command.out),
    )
    tables = {
        "accuracy, %": table(command, found),
        "accuracy by shift, %": by_shift(command, found),
        "drift: mean/angle/spectrum": drifts(found),
    }
    report.show({name: rows for name, rows in tables.items() if rows}, console, None)


if __name__ == "__main__":
    main()
