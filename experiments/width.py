"""`python -m experiments.width`: does the best rate of a narrow net serve a wide one?

An MLP on Fashion-MNIST, one pass over the training images, cosine schedule without
weight decay; loss on validation images. Each width, optimizer and rate is one row.
"""

import dataclasses
import datetime
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from flax import nnx

import dsbp_jax
from experiments import process
from experiments.data import loading
from experiments.data.batches import epoch_batches, normalize
from experiments.models.mlp import MLP
from experiments.study import runs


@dataclasses.dataclass(frozen=True)
class Width:
    """What is trained."""

    widths: tuple[int, ...] = (256, 1024)
    """Of the two hidden layers."""
    optimizers: tuple[str, ...] = ("adamw", "rms", "spectral")
    """AdamW, and `spectral_muon` with either scale."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Peak learning rates; ten times as large with the scale "spectral"."""
    seeds: tuple[int, ...] = (0, 1)
    """Of initialisation and batches."""
    batch: int = 256
    """Images of a step."""
    data_dir: str | None = None
    """Where data sets lie."""
    out: pathlib.Path = pathlib.Path("runs/width.json")
    """The results; the figure lies beside it."""


def optimizer(name: str, rate: Any, roles: Any) -> optax.GradientTransformation:
    """An optimizer by name."""
    if name == "adamw":
        return optax.adamw(rate, weight_decay=0.0)
    # All other leaves are Adam's, at the rates that suit it.
    adam = optax.warmup_cosine_decay_schedule(0, 3e-3, 10, 200)
    return dsbp_jax.spectral_muon(
        rate, 64, hidden=roles, scale=name, adam_learning_rate=adam
    )


def run(config: Width, data: Any, width: int, name: str, rate: float, seed: int):
    """The validation loss after one pass."""
    model = MLP(
        data.image_shape, data.num_classes, hidden=(width, width), rngs=nnx.Rngs(seed)
    )
    graph, params = nnx.split(model, nnx.Param)

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(normalize(images, data))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    sample = data.train.images[:8], data.train.labels[:8]
    roles = dsbp_jax.roles(loss_fn, params, *sample)
    batches = list(epoch_batches(data.train, config.batch, seed=seed, epoch=0))
    schedule = optax.warmup_cosine_decay_schedule(
        0, rate, len(batches) // 20, len(batches)
    )
    tx = optimizer(name, schedule, roles)

    @jax.jit
    def step(params, state, images, labels):
        value, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(params)
    for images, labels in batches:
        params, state, _ = step(params, state, images, labels)
    evaluate = jax.jit(loss_fn)
    return float(evaluate(params, data.validation.images, data.validation.labels))


def draw(rows: list[dict[str, Any]], file: pathlib.Path) -> None:
    """Loss over rate, a panel for each optimizer."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(9, 3), sharey=True)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        found = [row for row in rows if row["optimizer"] == name]
        for width in sorted({row["width"] for row in found}):
            part = [row for row in found if row["width"] == width]
            axis.plot(
                [row["rate"] for row in part],
                [row["loss"] for row in part],
                "o-",
                label=f"width {width}",
            )
        axis.set(xscale="log", xlabel="peak learning rate", title=name)
        axis.set_ylim(0.25, 0.6)
    np.atleast_1d(axes)[0].set_ylabel("validation loss, nats")
    np.atleast_1d(axes)[0].legend()
    figure.tight_layout()
    figure.savefig(file)


@process.keeps_programs
def main() -> None:
    """The command."""
    config = tyro.cli(Width)
    runs.make_folder(config.out)
    data = loading.load("fashion_mnist", data_dir=config.data_dir)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for name in config.optimizers:
        for width in config.widths:
            for rate in config.rates:
                used = rate * 10 if name == "spectral" else rate
                losses = [
                    run(config, data, width, name, used, seed) for seed in config.seeds
                ]
                row = {"optimizer": name, "width": width, "rate": used}
                rows.append(row | {"loss": float(np.mean(losses)), "losses": losses})
                print(rows[-1], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "config": dataclasses.asdict(config) | {"out": "", "data_dir": None},
        "seconds": time.perf_counter() - start,
        "jax": jax.__version__,
        "cores": runs.usable_cores(),
        "rows": rows,
    }
    config.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw(rows, config.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
