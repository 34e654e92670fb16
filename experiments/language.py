"""Optimizers on a byte-level language model: `python -m experiments.language`.

Each run is one file in the folder of the results, so that a stopped command goes on
where it was and several may share a folder.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import dsbp_jax
from experiments import process
from experiments.data import text as texts
from experiments.models.language import ByteTransformer
from experiments.optimizer_table import Uses, dimension_numbers, kernels

Make = Callable[[optax.Schedule, float, dict[str, str], dsbp_jax.Layout], Any]


def _adamw(rate, decay, roles, layout):
    del roles, layout
    return optax.adamw(rate, b2=0.95, weight_decay=decay, mask=kernels)


def _muon(rate, decay, roles, layout):
    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        consistent_rms=0.2,
        adam_b2=0.95,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=dimension_numbers(
            optax.contrib.MuonDimensionNumbers, Uses(layout, roles)
        ),
    )


def _ours(rank: int = 64, **options: Any) -> Make:
    def make(rate, decay, roles, layout):
        return dsbp_jax.spectral_muon(
            rate, rank, weight_decay=decay, hidden=roles, layout=layout, **options
        )

    return make


CONTENDERS: dict[str, Make] = {
    "adamw": _adamw,
    "muon": _muon,
    "spectral_muon": _ours(),
    "spectral_muon_16": _ours(16),
    "spectral_muon_1": _ours(refresh_every=1),
    "spectral_muon_10": _ours(refresh_every=10),
    "undamped": _ours(damping=0.0),
    "exact": _ours(1024),
    "scaled": _ours(0),
    "frozen": _ours(refresh_every=None),
    "low_rank_muon": _ours(residual=0.0),
}


@dataclasses.dataclass(frozen=True)
class Language:
    """What is trained, and how."""

    optimizers: tuple[str, ...] = ("adamw", "muon", "spectral_muon")
    """Names of contenders."""
    rates: tuple[float, ...] = (3e-3,)
    """Peak learning rates."""
    decays: tuple[float, ...] = (0.1,)
    """Weight decays, decoupled."""
    seeds: tuple[int, ...] = (0,)
    """Of initialisation and batches."""
    steps: int = 2000
    """Of a run; 5 % of them warm up, a cosine follows."""
    width: int = 128
    """Of the residual stream."""
    depth: int = 3
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    context: int = 128
    """Bytes."""
    batch: int = 16
    """Windows of a step."""
    test: bool = False
    """Measure the test text at the end, too."""
    out: pathlib.Path = pathlib.Path("runs/language")
    """Folder of the results."""


def run(config: Language, name: str, rate: float, decay: float, seed: int, text: Any):
    """One run."""
    model = ByteTransformer(
        config.width, config.depth, config.heads, config.context, rngs=nnx.Rngs(seed)
    )
    graph, params = nnx.split(model, nnx.Param)

    def loss_fn(params: Any, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(windows[:, :-1])
        targets = windows[:, 1:].astype(jnp.int32)
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        )

    sample = jnp.zeros((config.batch, config.context + 1), jnp.int32)
    roles = dsbp_jax.roles(loss_fn, params, sample)
    layout = dsbp_jax.layout(loss_fn, params, sample)
    warmup = max(1, config.steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, config.steps)
    tx = CONTENDERS[name](schedule, decay, roles, layout)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows):
        value, grads = jax.value_and_grad(loss_fn)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(params)
    length = config.context + 1
    batches = texts.windows(
        text.train, config.steps * config.batch, length, seed
    ).reshape(config.steps, config.batch, length)
    losses, times = [], []
    for batch in batches:
        start = time.perf_counter()
        params, state, value = step(params, state, batch.astype(np.int32))
        losses.append(float(value))
        times.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            break
    evaluate = jax.jit(loss_fn)

    def held_out(part: np.ndarray) -> float:
        chosen = texts.windows(part, 2048, length, 0).reshape(-1, 64, length)
        return float(np.mean([evaluate(params, x.astype(np.int32)) for x in chosen]))

    seconds = float(np.sum(times[2:]))
    return {
        "optimizer": name,
        "rate": rate,
        "decay": decay,
        "seed": seed,
        "validation": held_out(text.validation),
        "test": held_out(text.test) if config.test else None,
        "train": [
            round(float(np.mean(part)), 4) for part in np.array_split(losses, 20)
        ],
        "seconds": seconds,
        "median_step": float(np.median(times[2:])),
        "steps": len(losses),
    }


@process.keeps_programs
def main() -> None:
    """The command."""
    config = tyro.cli(Language)
    text = texts.standard_library()
    config.out.mkdir(parents=True, exist_ok=True)
    shape = f"w{config.width}x{config.depth}-s{config.steps}"
    for name in config.optimizers:
        for rate in config.rates:
            for decay in config.decays:
                for seed in config.seeds:
                    cell = f"{name}-{rate:g}-{decay:g}-{shape}-{seed}.json"
                    file = config.out / cell
                    if file.exists():
                        continue
                    found = run(config, name, rate, decay, seed, text)
                    found["digest"] = text.digest
                    found["config"] = dataclasses.asdict(config) | {"out": ""}
                    partial = file.with_suffix(f".{os.getpid()}")
                    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
                    partial.rename(file)
                    print(cell, found["validation"], found["seconds"], flush=True)


if __name__ == "__main__":
    main()
