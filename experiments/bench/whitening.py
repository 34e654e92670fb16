"""What dividing by the spectrum costs, and how flat it makes spectra that move."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from experiments import checks, process
from experiments.bench.step import mlp, plain
from experiments.bench.timing import Stateful, interleave
from experiments.bench.update import stats

WIDTH, ROWS, DEPTH = 2048, 2048, 2

# Rank and steps between two refreshes.
SETTINGS = ((64, 1), (64, 4), (16, 10))

interleaved = process.single_threaded_lapack(interleave)


@dataclasses.dataclass(frozen=True)
class WhiteningConfig:
    """What the benchmark of whitening measures."""

    periods: int = 4
    """Periods of twenty updates that are timed."""

    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Sides of the square kernels on which it is compared with Muon."""

    step: bool = True
    """Time the training step of an MLP of two layers of 2048 x 2048 as well."""

    def __post_init__(self):
        """Checks every value."""
        checks.count("whitening.periods", self.periods)
        checks.some("whitening.widths", self.widths)
        checks.counts("whitening.widths", self.widths, checks.MOST_WIDE)


def whitened(rank: int, every: int) -> optax.GradientTransformation:
    """Momentum, the filter, a learning rate."""
    return optax.chain(
        optax.trace(0.95),
        dsbp_jax.spectral_whitening(rank, refresh_every=every),
        optax.scale(-0.01),
    )


def contenders() -> dict[str, optax.GradientTransformation]:
    """What is compared on one kernel, Muon apart."""
    found = {"adam": optax.adam(1e-3), "momentum": optax.sgd(0.1, momentum=0.9)}
    for rank, every in SETTINGS:
        found[f"spectral_whitening, rank {rank}, every {every}"] = whitened(rank, every)
    found["spectral_muon, rank 64, every 4"] = dsbp_jax.spectral_muon(
        1e-3, refresh_every=4
    )
    return found


def training(width: int, tx: optax.GradientTransformation) -> Stateful:
    """Steps of an optimizer on one kernel: update and new parameters."""
    keys = jax.random.split(jax.random.key(0))
    params = {"kernel": jax.random.normal(keys[0], (width, width))}
    # Not flat, as gradients are.
    decay = jnp.logspace(0, -2, width)
    grads = {"kernel": jax.random.normal(keys[1], (width, width)) * decay}

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Stateful(step, (params, tx.init(params)), grads)


def against_adam(periods: int) -> list[dict[str, Any]]:
    """One kernel of 2048 x 2048; the updates span whole periods."""
    functions = {name: training(WIDTH, tx) for name, tx in contenders().items()}
    times = interleaved(functions, 20 * periods)
    muon = training(WIDTH, optax.contrib.muon(1e-3))
    times |= interleaved({"optax.contrib.muon": muon}, 3)
    reference = float(np.mean(times["adam"]))
    return [
        stats(name, seconds, reference)
        | {"worst / adam": float(np.max(seconds)) / reference}
        for name, seconds in times.items()
    ]


def against_muon(width: int, periods: int) -> dict[str, Any]:
    """One row: a kernel of this width, ours at the defaults."""
    functions = {
        "ours": training(width, whitened(min(64, width // 2), 4)),
        "muon": training(width, optax.contrib.muon(1e-3)),
        "adam": training(width, optax.adam(1e-3)),
    }
    rounds = 20 * periods if width <= 512 else 12
    mean = {
        name: float(np.mean(seconds))
        for name, seconds in interleaved(functions, rounds).items()
    }
    return {
        "kernel": f"{width} x {width}",
        "rank": str(min(64, width // 2)),
        **{f"{name} ms": seconds * 1e3 for name, seconds in mean.items()},
        "muon / ours": mean["muon"] / mean["ours"],
    }


def whole_step(periods: int) -> list[dict[str, Any]]:
    """Gradient and update of an MLP."""
    problem = mlp(WIDTH, ROWS, depth=DEPTH)
    found = {
        "momentum": optax.sgd(0.01, 0.9),
        "adam": optax.adam(1e-3),
        "spectral_whitening, rank 64, every 4": whitened(64, 4),
        "spectral_whitening, rank 64, every 1": whitened(64, 1),
        "spectral_muon, rank 64, every 4": dsbp_jax.spectral_muon(
            1e-3, refresh_every=4
        ),
    }
    functions = {}
    for name, tx in found.items():
        method = plain(problem, tx)
        carry = jax.tree.map(jnp.copy, method.carry)
        functions[name] = Stateful(method.step, carry, problem.x)
    times = interleaved(functions, 8 * periods)
    reference = float(np.mean(times["momentum"]))
    rows = []
    for name, seconds in times.items():
        row = stats(name, seconds, reference)
        row["mean / momentum"] = row.pop("mean / adam")
        rows.append(row)
    return rows


def _flat(update: np.ndarray, vectors: np.ndarray, rank: int) -> float:
    """Top over median singular value of an update filtered with a given basis."""
    thin = update @ vectors
    values, rotation = np.linalg.eigh(thin.T @ thin)
    count = min(update.shape) - rank
    tail = ((update**2).sum() - values.sum()) / count
    head = values**-0.5 - tail**-0.5
    inside = thin @ (rotation * head) @ (vectors @ rotation).T
    found = np.linalg.svd(tail**-0.5 * update + inside, compute_uv=False)
    return found[0] / np.median(found)


def lag(num_steps: int = 60, rank: int = 4) -> list[dict[str, Any]]:
    """Four spikes over noise that turn a little at each step, 256 x 64.

    Bases are refreshed by one power step inside the filter (ours), by the same after
    the filter, or by warm block Lanczos before the filter.
    """
    shape, generator = (256, 64), np.random.default_rng(0)
    noise = generator.normal(size=shape) / 16
    spikes = [generator.normal(size=(side, rank)) for side in shape]
    updates = []
    for _ in range(num_steps):
        for factor in spikes:
            factor += 0.15 * generator.normal(size=factor.shape)
        left, right = (np.linalg.qr(factor)[0] for factor in spikes)
        updates.append((noise + left * [40, 30, 20, 15] @ right.T).astype(np.float32))
    best = [_flat(u, np.linalg.svd(u)[2][:rank].T, rank) for u in updates]
    lanczos = jax.jit(
        lambda u, basis: dsbp_jax.linalg.refresh_basis(dsbp_jax.linalg.gram(u), basis)
    )
    rows = []
    for every in (1, 4, 10):
        tx = dsbp_jax.spectral_whitening(rank, refresh_every=every)
        step, state = jax.jit(tx.update), tx.init({"u": updates[0]})
        basis = dsbp_jax.linalg.init_basis(shape[1], rank, key=jax.random.key(0))
        found: dict[str, list[float]] = {"inside": [], "after": [], "lanczos": []}
        for number, update in enumerate(updates):
            old = np.asarray(state.tracked["output"]["u"].vectors)
            _, state = step({"u": update}, state)
            new = np.asarray(state.tracked["output"]["u"].vectors)
            if number % every == 0:
                basis = lanczos(update, basis)
            found["inside"].append(_flat(update, new, rank))
            found["after"].append(_flat(update, old, rank))
            found["lanczos"].append(_flat(update, np.asarray(basis.vectors), rank))
        mean = lambda values: float(np.mean(values[num_steps // 3 :]))
        rows.append(
            {
                "refreshed every": str(every),
                "exact basis": mean(best),
                "power step inside (ours)": mean(found["inside"]),
                "power step after": mean(found["after"]),
                "block Lanczos before": mean(found["lanczos"]),
            }
        )
    return rows


def run(config: WhiteningConfig) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    compare = functools.partial(against_muon, periods=config.periods)
    tables = {
        f"Momentum, whitening and new parameters of one kernel, {WIDTH}²": (
            against_adam(config.periods)
        ),
        "Drifting spikes, top over median singular value": lag(),
        "Rank 64 at most, every 4 steps, against Muon": [
            compare(width) for width in config.widths
        ],
    }
    if config.step:
        title = f"Training step, MLP of {DEPTH} layers {WIDTH}², {ROWS} rows"
        tables[title] = whole_step(config.periods)
    return tables
