"""What one update costs: time and state of every transform, per kernel shape."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from experiments import checks
from experiments.bench.timing import Stateful, interleave

WIDTH, RANK, EVERY = 2048, 64, 10

# By name: the shape, and how a model would use it.
SHAPES: dict[str, tuple[tuple[int, ...], dsbp_jax.MatrixView]] = {
    "2048x2048": ((2048, 2048), dsbp_jax.MatrixView((0,), (1,))),
    "1024x4096": ((1024, 4096), dsbp_jax.MatrixView((0,), (1,))),
    "attention": ((1024, 16, 64), dsbp_jax.MatrixView((0,), (1, 2))),
    "conv": ((3, 3, 512, 512), dsbp_jax.MatrixView((2,), (3,))),
    "stack": ((8, 512, 512), dsbp_jax.MatrixView((1,), (2,), (0,))),
}


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """What the update benchmark measures."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Names of kernel shapes: 2048x2048, 1024x4096, attention, conv, stack."""

    periods: int = 3
    """Refresh periods of ten updates that are timed."""

    step: bool = True
    """Time the training step of an MLP with dsbp as well."""

    def __post_init__(self):
        """Checks every value."""
        for name in self.shapes:
            checks.one_of("update.shapes", name, SHAPES)
        checks.at_least("update.periods", self.periods, 1)


def transforms(layout: dsbp_jax.Layout, is_matrix: bool) -> dict[str, Any]:
    """What is measured, by name.

    Args:
      layout: The view of the kernel.
      is_matrix: Whether the kernel is 2-D: the peers see other kernels as vectors.

    Returns:
      Optax transformations, with what makes one refresh in each update or in none.
    """
    shared = {"refresh_every": EVERY, "layout": layout}
    adam = optax.scale_by_adam()
    found = {
        "momentum": optax.trace(0.9),
        "spectral_projection, output": dsbp_jax.spectral_projection(RANK, **shared),
        "spectral_projection, input": dsbp_jax.spectral_projection(
            RANK, side="input", **shared
        ),
        "spectral_projection, κ = 0.1": dsbp_jax.spectral_projection(
            RANK, residual=0.1, **shared
        ),
        "dsbp": dsbp_jax.dsbp(0.1, RANK, **shared),
        "spectral_subspace(adam)": dsbp_jax.spectral_subspace(adam, RANK, **shared),
        "spectral_subspace(adam), κ = 0.1": dsbp_jax.spectral_subspace(
            adam, RANK, residual=0.1, **shared
        ),
        "lie_rotation": dsbp_jax.lie_rotation(0.1, rank=RANK, **shared),
    }
    if is_matrix:
        found["optax.contrib.galore"] = optax.contrib.scale_by_galore(
            RANK, update_proj_gap=EVERY
        )
        found["optax.contrib.muon"] = optax.contrib.muon(1e-3)
    return {"adam": adam, **found}


def update_cost(name: str, periods: int) -> list[dict[str, Any]]:
    """The updates of one kernel; they span whole refresh periods.

    Args:
      name: A name of `SHAPES`.
      periods: Refresh periods that are timed.

    Returns:
      A row for each transform. Times of a refresh are those of the updates that
      refresh over the median of all, of which nine in ten do not.
    """
    shape, view = SHAPES[name]
    keys = jax.random.split(jax.random.key(0))
    params = {"kernel": jax.random.normal(keys[0], shape)}
    decay = jnp.logspace(0, -2, shape[-1])
    grads = {"kernel": jax.random.normal(keys[1], shape) * decay}
    layout = dsbp_jax.Layout((("kernel", view),))
    runs, size = {}, {}
    for label, tx in transforms(layout, len(shape) == 2).items():
        # State and updates live in donated buffers; the gradient is the same always.
        step = lambda carry, grads, tx=tx: tx.update(grads, carry[1], params)
        state = tx.init(params)
        size[label] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        runs[label] = Stateful(step, (jax.tree.map(jnp.copy, grads), state), grads)
    times = interleave(runs, periods * EVERY)
    reference = float(np.mean(times["adam"]))
    rows = [
        {**stats(label, seconds, reference), "state MB": size[label] / 1e6}
        for label, seconds in times.items()
    ]
    if name == "2048x2048":
        floor = stats("floor: two products at rank 64", _product_floor(), reference)
        rows.append({**floor, "state MB": 0.0})
    return rows


def stats(name: str, seconds: np.ndarray, reference: float) -> dict[str, Any]:
    """Median, mean and worst; what a refresh adds, where one in ten does."""
    median = np.median(seconds)
    refreshes = np.sort(seconds)[-(len(seconds) // EVERY) or -1 :]
    return {
        "what": name,
        "median ms": median * 1e3,
        "mean ms": np.mean(seconds) * 1e3,
        "worst ms": np.max(seconds) * 1e3,
        "worst / median": np.max(seconds) / median,
        "refresh adds ms": (np.median(refreshes) - median) * 1e3,
        "mean / adam": np.mean(seconds) / reference,
    }


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
    return [stats(name, seconds, reference) for name, seconds in times.items()]


def run(config: UpdateConfig) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    tables = {
        f"Update of one kernel, {name}, rank {RANK}": update_cost(name, config.periods)
        for name in config.shapes
    }
    if config.step:
        tables[f"Training step, MLP {WIDTH}×3, batch 512"] = step_cost()
    return tables
