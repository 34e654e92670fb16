"""What one update costs: time and state of every transform, per kernel shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from experiments import checks, process
from experiments.bench.step import mlp, plain
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
        checks.some("update.shapes", self.shapes)
        for name in self.shapes:
            checks.one_of("update.shapes", name, SHAPES)
        checks.count("update.periods", self.periods)


def ours(layout: dsbp_jax.Layout) -> dict[str, optax.GradientTransformation]:
    """This package's transformations of one kernel, and what they are compared with."""
    shared = {"refresh_every": EVERY, "layout": layout}
    adam = optax.adam(1e-3)
    return {
        "adam": adam,
        "momentum": optax.sgd(0.1, momentum=0.9),
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
        "momentum, spectral_whitening": optax.chain(
            optax.trace(0.95), dsbp_jax.spectral_whitening(RANK, **shared)
        ),
    }


def peers(
    view: dsbp_jax.MatrixView, gap: int = EVERY
) -> dict[str, optax.GradientTransformation]:
    """Optax's own, for kernels that are one matrix."""
    axes = view.input_axes, view.output_axes
    return {
        "optax.contrib.galore": optax.contrib.galore(
            1e-3,
            RANK,
            update_proj_gap=gap,
            weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers(*axes),
        ),
        "optax.contrib.muon": optax.contrib.muon(
            1e-3,
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(*axes),
        ),
    }


# GaLore's SVD wants LAPACK's threads, with which ours is slower.
single_threaded = process.single_threaded_lapack(interleave)


def update_cost(name: str, periods: int) -> list[dict[str, Any]]:
    """The updates of one kernel; they span whole refresh periods.

    Args:
      name: A name of `SHAPES`.
      periods: Refresh periods that are timed.

    Returns:
      A row for each transformation. A refresh is timed by itself, as the difference
      between an update that refreshes everything and one that refreshes nothing.
    """
    shape, view = SHAPES[name]
    keys = jax.random.split(jax.random.key(0))
    params = {"kernel": jax.random.normal(keys[0], shape)}
    decay = jnp.logspace(0, -2, shape[-1])
    grads = {"kernel": jax.random.normal(keys[1], shape) * decay}
    quick, slow = ours(dsbp_jax.Layout((("kernel", view),))), {}
    if not (view.batch_axes or view.window_axes(len(shape))):
        slow = peers(view)

    def updates(tx: optax.GradientTransformation, **extra: Any) -> Stateful:
        def step(carry: Any, grads: Any, params: Any) -> Any:
            _, state = carry
            return tx.update(grads, state, params, **extra)

        return Stateful(
            step, (jax.tree.map(jnp.copy, grads), tx.init(params)), grads, params
        )

    times = single_threaded(
        {label: updates(tx) for label, tx in quick.items()}, periods * EVERY
    ) | interleave({label: updates(tx) for label, tx in slow.items()}, periods * EVERY)
    forced = single_threaded(
        {
            (label, flag): updates(tx, refresh=flag)
            for label, tx in quick.items()
            if label not in ("adam", "momentum")
            for flag in (True, False)
        },
        EVERY,
    )
    if slow:
        label = "optax.contrib.galore"
        every = {True: 1, False: 2**30}
        forced |= interleave(
            {(label, flag): updates(peers(view, every[flag])[label]) for flag in every},
            EVERY // 2,
        )
    reference = float(np.mean(times["adam"]))
    rows = []
    for label, seconds in times.items():
        refresh: Any = ""
        if (label, True) in forced:
            medians = [np.median(forced[label, flag]) for flag in (True, False)]
            refresh = (medians[0] - medians[1]) * 1e3
        state = (quick | slow)[label].init(params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
        row = stats(label, seconds, reference)
        rows.append({**row, "refresh ms": refresh, "state MB": size})
    if name == "2048x2048":
        floor = stats("floor: two products at rank 64", _product_floor(), reference)
        rows.append({**floor, "refresh ms": "", "state MB": ""})
    return rows


def stats(name: str, seconds: np.ndarray, reference: float) -> dict[str, Any]:
    """Median, mean and worst of the updates of whole periods."""
    median = np.median(seconds)
    return {
        "what": name,
        "median ms": median * 1e3,
        "mean ms": np.mean(seconds) * 1e3,
        "worst ms": np.max(seconds) * 1e3,
        "worst / median": np.max(seconds) / median,
        "mean / adam": np.mean(seconds) / reference,
    }


def _product_floor(rounds: int = 10) -> np.ndarray:
    """Seconds of the projection's arithmetic at the speed of a large product."""
    square = jax.random.normal(jax.random.key(2), (WIDTH, WIDTH))
    product = jax.jit(jnp.matmul)
    seconds = interleave({"product": lambda: product(square, square)}, rounds)
    return seconds["product"] * 2 * RANK / WIDTH


def step_cost(periods: int = 4, rows: int = 512) -> list[dict[str, Any]]:
    """A training step with dsbp, the projection of a finished gradient."""
    problem = mlp(WIDTH, rows)
    found = {
        "adam": optax.adam(1e-3),
        "momentum": optax.sgd(0.01, 0.9),
        "dsbp": dsbp_jax.dsbp(0.01, RANK, refresh_every=EVERY),
    }
    runs = {}
    for label, tx in found.items():
        method = plain(problem, tx)
        carry = jax.tree.map(jnp.copy, method.carry)
        runs[label] = Stateful(method.step, carry, problem.x)
    times = single_threaded(runs, periods * EVERY)
    reference = float(np.mean(times["adam"]))
    return [stats(label, seconds, reference) for label, seconds in times.items()]


def run(config: UpdateConfig) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    tables = {
        f"Update of one kernel, {name}, rank {RANK}": update_cost(name, config.periods)
        for name in config.shapes
    }
    if config.step:
        tables[f"Training step, MLP of 4 layers {WIDTH}², 512 rows"] = step_cost()
    return tables
