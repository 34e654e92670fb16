"""Spectral projection: what it adds to an update and to a training step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from experiments.bench.timing import Stateful, interleave

WIDTH, RANK, EVERY = 2048, 64, 10


def _stats(name: str, seconds: np.ndarray, reference: float) -> dict[str, Any]:
    return {
        "what": name,
        "median ms": np.median(seconds) * 1e3,
        "mean ms": np.mean(seconds) * 1e3,
        "worst ms": np.max(seconds) * 1e3,
        "worst / median": np.max(seconds) / np.median(seconds),
        "amortised / reference": np.mean(seconds) / reference,
    }


def update_cost(periods: int = 6) -> list[dict[str, Any]]:
    """One update of a 2048² kernel; the mean spans whole refresh periods."""
    keys = jax.random.split(jax.random.key(0))
    params = {"kernel": jax.random.normal(keys[0], (WIDTH, WIDTH))}
    decay = jnp.logspace(0, -2, WIDTH)
    grads = {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) * decay}
    transforms = {
        "adam": optax.scale_by_adam(),
        "momentum": optax.trace(0.9),
        "spectral_projection, output": dsbp_jax.spectral_projection(RANK),
        "spectral_projection, input": dsbp_jax.spectral_projection(RANK, side="input"),
        "spectral_projection, κ = 0.1": dsbp_jax.spectral_projection(
            RANK, residual=0.1
        ),
        "dsbp": dsbp_jax.dsbp(0.1, RANK),
    }
    runs = {}
    for name, tx in transforms.items():
        # State and updates live in donated buffers; the gradient is the same always.
        step = lambda carry, grads, tx=tx: tx.update(grads, carry[1], params)
        copy = jax.tree.map(jnp.copy, grads)
        runs[name] = Stateful(step, (copy, tx.init(params)), grads)
    times = interleave(runs, periods * EVERY)
    reference = float(np.mean(times["adam"]))
    rows = [_stats(name, seconds, reference) for name, seconds in times.items()]
    floor = _product_floor()
    return [*rows, _stats("floor: two products at rank 64", floor, reference)]


def _product_floor(rounds: int = 10) -> np.ndarray:
    """Seconds of the projection's arithmetic at the speed of a large product."""
    square = jax.random.normal(jax.random.key(2), (WIDTH, WIDTH))
    product = jax.jit(jnp.matmul)
    seconds = interleave({"product": lambda: product(square, square)}, rounds)
    return seconds["product"] * 2 * RANK / WIDTH


def step_cost(periods: int = 4, batch: int = 512) -> list[dict[str, Any]]:
    """A training step of an MLP 784-2048-2048-2048-10."""
    sizes = [784, WIDTH, WIDTH, WIDTH, 10]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = {
        f"layer{i}": jax.random.normal(keys[i], (m, n)) * np.sqrt(2 / m)
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }
    x = jax.random.normal(keys[-1], (batch, sizes[0]))
    labels = jnp.arange(batch) % sizes[-1]

    def loss_fn(params: Any) -> jax.Array:
        h = x
        for name in list(params)[:-1]:
            h = jax.nn.relu(h @ params[name])
        logits = h @ params[list(params)[-1]]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    transforms = {
        "adam": optax.adam(1e-3),
        "momentum": optax.sgd(0.01, 0.9),
        "dsbp": dsbp_jax.dsbp(0.01, RANK, refresh_every=EVERY),
    }
    runs = {}
    for name, tx in transforms.items():

        def step(carry: Any, tx: Any = tx) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return optax.apply_updates(params, updates), state

        runs[name] = Stateful(step, (jax.tree.map(jnp.copy, params), tx.init(params)))
    times = interleave(runs, periods * EVERY)
    reference = float(np.mean(times["adam"]))
    return [_stats(name, seconds, reference) for name, seconds in times.items()]


def run() -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    return {
        f"Update of one {WIDTH}² kernel, rank {RANK}; reference: adam": update_cost(),
        f"Training step, MLP {WIDTH}×3, batch 512; reference: adam": step_cost(),
    }
