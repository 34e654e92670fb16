"""Smaller models beside their rivals: `python -m experiments.compress`.

A model is trained, cut to a share of its FLOPs by each method, measured, fine-tuned for
the same number of epochs at the same rate, and measured again. Each cell (method,
share, seed) is one file in the folder of the results, so that a stopped command goes on
where it was; the trained model of a seed is kept there, too.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx, serialization

from dsbp_jax import architecture
from dsbp_jax.layers import leaves_by_path
from experiments import process
from experiments.bench.timing import interleave
from experiments.compression_rivals import RIVALS
from experiments.data.batches import epoch_batches, normalize
from experiments.data.dataset import Dataset, Split
from experiments.data.loading import load
from experiments.models import build
from experiments.study import runs

_EVALUATED = 500  # images at once
_TIMED = 30  # passes of each model, interleaved


@dataclasses.dataclass(frozen=True)
class Compress:
    """What is trained and cut, and how."""

    dataset: str = "digits"
    """Name of the data set."""
    data_dir: str | None = None
    """Folder with its files; `digits` needs none."""
    model: str = "mlp"
    """`mlp`, `cnn` or `vit`."""
    widths: tuple[int, ...] = ()
    """Of an MLP's hidden layers or a CNN's blocks; the model's own by default."""
    methods: tuple[str, ...] = (
        "spectral",
        "unrepaired",
        "l1",
        "magnitude",
        "random",
        "svd",
    )
    """`spectral` is ours; the others are rivals at equal FLOPs."""
    flops: tuple[float, ...] = (0.5,)
    """Shares of the FLOPs that are kept."""
    seeds: tuple[int, ...] = (0,)
    """Of initialisation and batches."""
    epochs: int = 5
    """Of training; 5 % of the steps warm up, a cosine follows."""
    tune_epochs: int = 1
    """After the cut."""
    rate: float = 1e-3
    """Adam's peak rate in training."""
    tune_rate: float = 3e-4
    """In fine-tuning."""
    batch: int = 256
    """Images of a step."""
    images: int = 4096
    """Training images whose activations are looked at."""
    batch_sizes: tuple[int, ...] = (256, 1)
    """At which passes are timed."""
    multiple_of: int = 8
    """Of which widths are multiples, for all methods."""
    test: bool = False
    """Measure the test split, too; choose nothing by it."""
    out: pathlib.Path = pathlib.Path("runs/compress")
    """Folder of the results."""

    @property
    def trained(self) -> str:
        """What a trained model depends on but for its seed, as part of a file name."""
        widths = "x".join(map(str, self.widths)) or "own"
        return f"{self.dataset}-{self.model}-{widths}-e{self.epochs}".replace("/", "_")


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as a function of its arrays and images."""

    apply: Callable[[Any, Any], Any]
    params: Any


def network(config: Compress, dataset: Dataset, seed: int) -> Network:
    """The untrained model."""
    options: dict[str, Any] = {}
    if config.widths:
        options = {"channels" if config.model == "cnn" else "hidden": config.widths}
    model = build(
        config.model,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        rngs=nnx.Rngs(seed),
        **options,
    )
    model.eval()
    graph, params = nnx.split(model, nnx.Param)
    return Network(lambda params, x: nnx.merge(graph, params, copy=True)(x), params)


def train(
    net: Network, dataset: Dataset, epochs: int, rate: float, batch: int, seed: int
) -> Any:
    """Adam with warm-up and cosine; the parameters after it."""
    steps = epochs * (len(dataset.train) // batch)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 20), steps)
    tx = optax.adam(schedule)

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = net.apply(params, normalize(images, dataset))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, images, labels):
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = net.params, jax.jit(tx.init)(net.params)
    for epoch in range(epochs):
        for images, labels in epoch_batches(
            dataset.train, batch, seed=seed, epoch=epoch
        ):
            params, state = step(params, state, images, labels)
    return params


def accuracy(net: Network, dataset: Dataset, split: Split) -> float:
    """The share of images that are classified rightly."""
    run = jax.jit(lambda p, x: net.apply(p, normalize(x, dataset)).argmax(-1))
    right = 0
    for start in range(0, len(split), _EVALUATED):
        part = slice(start, start + _EVALUATED)
        right += int(np.sum(run(net.params, split.images[part]) == split.labels[part]))
    return right / len(split)


def seen(config: Compress, dataset: Dataset) -> Iterator[jax.Array]:
    """Training images whose activations are looked at."""
    count = min(config.images, len(dataset.train))
    for start in range(0, count, _EVALUATED):
        stop = min(start + _EVALUATED, count)
        yield normalize(dataset.train.images[start:stop], dataset)


def cut(
    config: Compress,
    method: str,
    net: Network,
    dataset: Dataset,
    share: float,
    seed: int,
) -> tuple[Network, dict[str, Any]]:
    """The smaller model, and what is to be said of it."""
    start = time.perf_counter()
    batches = list(seen(config, dataset))
    if method == "spectral":
        plan = architecture.plan(
            net.apply, net.params, batches, flops=share, multiple_of=config.multiple_of
        )
        small = architecture.compress(net.apply, net.params, plan)
        apply, params = small.apply, small.params
        said = {"flops": plan.flops, "plan": str(plan)}
    else:
        apply, params, kept = RIVALS[method](
            net.apply, net.params, batches, share, config.multiple_of, seed
        )
        said = {"flops": kept}
    return Network(apply, params), said | {"seconds": time.perf_counter() - start}


def latencies(
    config: Compress, nets: tuple[Network, Network], dataset: Dataset
) -> dict[str, list[float]]:
    """Median seconds of a pass of each, runs interleaved, by batch size."""
    found = {}
    for size in config.batch_sizes:
        x = normalize(
            dataset.train.images[np.arange(size) % len(dataset.train)], dataset
        )
        passes = {
            str(place): functools.partial(jax.jit(net.apply), net.params, x)
            for place, net in enumerate(nets)
        }
        times = interleave(passes, _TIMED)
        found[str(size)] = [float(np.median(own)) for own in times.values()]
    return found


def trained(config: Compress, dataset: Dataset, seed: int) -> Network:
    """The trained model of a seed, from its file where there is one."""
    net = network(config, dataset, seed)
    file = config.out / f"{config.trained}-{seed}.msgpack"
    arrays, treedef = jax.tree.flatten(net.params)
    if file.exists():
        arrays = serialization.from_bytes(arrays, file.read_bytes())
        return Network(net.apply, jax.tree.unflatten(treedef, arrays))
    params = train(net, dataset, config.epochs, config.rate, config.batch, seed)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(serialization.to_bytes(jax.tree.leaves(params)))
    partial.rename(file)
    return Network(net.apply, params)


def cell(
    config: Compress,
    dataset: Dataset,
    net: Network,
    method: str,
    share: float,
    seed: int,
) -> dict[str, Any]:
    """One method at one share: before and after fine-tuning."""
    small, said = cut(config, method, net, dataset, share, seed)
    held = [("validation", dataset.validation)]
    held += [("test", dataset.test)] if config.test else []
    tuned = Network(
        small.apply,
        train(
            small,
            dataset,
            config.tune_epochs,
            config.tune_rate,
            config.batch,
            seed + 1000,
        ),
    )
    models = {"original": net, "cut": small, "tuned": tuned}
    count = lambda one: sum(
        leaf.size for leaf in leaves_by_path(one.params).values() if leaf is not None
    )
    return {
        "method": method,
        "share": share,
        "seed": seed,
        **said,
        "parameters": count(small) / count(net),
        "latency": latencies(config, (net, small), dataset),
        "accuracy": {
            split: {name: accuracy(one, dataset, part) for name, one in models.items()}
            for split, part in held
        },
    }


def table(cells: list[dict[str, Any]]) -> str:
    """A row for each method and share: means over seeds, and standard errors."""
    lines = ["method share flops original cut tuned latency seeds"]
    keys = dict.fromkeys((one["method"], one["share"]) for one in cells)
    for method, share in keys:
        own = [one for one in cells if (one["method"], one["share"]) == (method, share)]
        row = [method, f"{share:g}", f"{np.mean([one['flops'] for one in own]):.2f}"]
        for name in ("original", "cut", "tuned"):
            values = [100 * one["accuracy"]["validation"][name] for one in own]
            error = np.std(values, ddof=1) / len(own) ** 0.5 if len(own) > 1 else 0.0
            row.append(f"{np.mean(values):.2f}±{error:.2f}")
        ratio = lambda size, own=own: np.mean(
            [one["latency"][size][1] / one["latency"][size][0] for one in own]
        )
        ratios = [f"{ratio(size):.2f}@{size}" for size in own[0]["latency"]]
        lines.append(" ".join([*row, ",".join(ratios), str(len(own))]))
    columns = list(zip(*(line.split() for line in lines), strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            c.ljust(w) for c, w in zip(line.split(), widths, strict=True)
        ).rstrip()
        for line in lines
    )


@process.keeps_programs
def main() -> None:
    """The command."""
    config = tyro.cli(Compress)
    config.out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config) | {"out": "", "data_dir": None}
    cells = []
    for seed in config.seeds:
        dataset = load(config.dataset, data_dir=config.data_dir, seed=seed)
        net = None
        for method in config.methods:
            for share in config.flops:
                tuned = f"t{config.tune_epochs}-{method}-{share:g}-{seed}"
                file = config.out / f"{config.trained}-{tuned}.json"
                if not file.exists():
                    net = net or trained(config, dataset, seed)
                    found = cell(config, dataset, net, method, share, seed)
                    runs.write_json(file, found | {"config": settings})
                    print(file.name, found["accuracy"], flush=True)
                cells.append(json.loads(file.read_text(encoding="utf-8")))
    print(table(cells))


if __name__ == "__main__":
    main()
