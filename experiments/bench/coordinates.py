"""A training step in spectral coordinates over Adam's, every fold in its own step."""

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from experiments import checks
from experiments.bench import step
from experiments.bench.timing import Stateful

DEPTH = 3
EVERY = 20  # steps between two folds of a leaf
PLAIN = 3  # our steps between two plain ones


@dataclasses.dataclass(frozen=True)
class CoordinatesConfig:
    """Which steps are timed."""

    model: Literal["mlp", "transformer"] = "mlp"
    """Three square layers, or two pre-norm blocks with attention over 128 tokens."""

    widths: tuple[int, ...] = (2048, 4096)
    """Width of the layers; a block's inner width is twice that."""

    rows: tuple[int, ...] = (32, 128, 512, 2048)
    """Rows of a batch."""

    rank: int = 64
    """Columns."""

    periods: int = 10
    """Periods of folds that are timed, at most."""

    seconds: float = 200.0
    """After the first period no other is begun that would end later than this."""

    def __post_init__(self):
        """Checks every value."""
        for name in ("widths", "rows"):
            checks.counts(f"coordinates.{name}", getattr(self, name), checks.MOST_WIDE)
        step.check_widths("coordinates", (self.model,), self.widths)
        checks.count("coordinates.rank", self.rank)
        checks.count("coordinates.periods", self.periods)
        checks.positive("coordinates.seconds", self.seconds)


class _Coordinates:
    """Steps of `spectral_training`, one after the other."""

    def __init__(self, problem: step.Problem, tx: optax.GradientTransformation, k: int):
        self._training = dsbp_jax.spectral_training(
            problem.loss, tx, k, fold_every=EVERY
        )
        self._x = problem.x
        self.state = self._training.init(
            problem.params, problem.x, key=jax.random.key(2)
        )

    def __call__(self) -> Any:
        """Runs a step, and the fold that is due in it."""
        self.state, value = self._training.step(self.state, self._x)
        return self.state, value

    def compile(self) -> None:
        """Runs a period: a step of every kind."""
        for _ in range(EVERY):
            jax.block_until_ready(self())


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def measure(model: str, width: int, rows: int, config: CoordinatesConfig) -> dict:
    """The row of one model: whole periods of folds, a plain step now and then."""
    options = {"depth": DEPTH} if model == "mlp" else {}
    problem = step.PROBLEMS[model](width, rows, **options)
    tx = optax.adam(1e-3)

    def adam(carry: Any, x: jax.Array) -> Any:
        params, opt_state = carry
        grads = jax.grad(problem.loss)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    ours = _Coordinates(problem, tx, config.rank)
    ours.compile()
    carry = jax.tree.map(jnp.copy, (problem.params, tx.init(problem.params)))
    sizes = step.state_bytes(carry[1]), step.state_bytes(ours.state.opt_state)
    plain = Stateful(adam, carry, problem.x)
    del carry
    _seconds(plain)
    times: list[float] = []
    plains: list[float] = []
    begin = time.perf_counter()
    while len(times) < config.periods * EVERY:
        for number in range(EVERY):
            times.append(_seconds(ours))
            if number % PLAIN == 0:
                plains.append(_seconds(plain))
        done = len(times) // EVERY
        if (time.perf_counter() - begin) * (done + 1) / done > config.seconds:
            break
    reference, median = np.median(plains), np.median(times)
    late = np.percentile(times, 99)
    return {
        "width": width,
        "rows": rows,
        "Adam ms": reference * 1e3,
        "median ms": median * 1e3,
        "mean ms": np.mean(times) * 1e3,
        "mean / Adam": np.mean(times) / reference,
        "p99 / median": late / median,
        "p99 / Adam": late / reference,
        "periods": len(times) // EVERY,
        "state / Adam": sizes[1] / sizes[0],
    }


def run(
    config: CoordinatesConfig = CoordinatesConfig(),
) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's table, by title."""
    name = {"mlp": f"MLP of {DEPTH} square layers", "transformer": "Two blocks"}
    title = f"{name[config.model]}, {config.rank} columns, Adam, folds by turns"
    rows = [
        measure(config.model, width, rows, config)
        for width in config.widths
        for rows in config.rows
    ]
    return {title: [{k: _plain(v) for k, v in row.items()} for row in rows]}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
