"""A model that does not fit with Adam: `python -m experiments.large`.

Trains an MLP of square layers whose kernels alone fill a third of 24 GB, in spectral
coordinates. Prints what the compiler plans to hold for each part, and for plain Adam
beside it, the loss of each step, its seconds, and the resident peak of the process.
"""

import dataclasses
import functools
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dsbp_jax
from experiments import checks, cli, process
from experiments.bench import report

PROG = "experiments.large"
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a model in coordinates where Adam's moments would not fit."""

    width: int = 10_240
    """Width of the layers."""

    depth: int = 18
    """Layers."""

    rows: int = 128
    """Rows of a batch."""

    rank: int = 64
    """Columns of each layer."""

    steps: int = 30
    """Steps of training."""

    fold_every: int = 10
    """Steps between two folds of a layer."""

    learning_rate: float = 1e-4
    """Of Adam."""

    out: pathlib.Path | None = None
    """Write the tables as JSON to this file as well."""

    def __post_init__(self):
        """Checks every value."""
        for name in ("width", "depth", "rows", "rank", "steps", "fold_every"):
            checks.count(name, getattr(self, name))
        checks.positive("learning_rate", self.learning_rate)


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """A squared error of square layers with relu between them."""
    *hidden, last = params.values()
    h = x
    for kernel in hidden:
        h = jax.nn.relu(h @ kernel)
    return jnp.mean((h @ last - y) ** 2)


@functools.partial(jax.jit, static_argnums=1)
def kernel(key: jax.Array, width: int) -> jax.Array:
    """Of He's scale."""
    return jax.random.normal(key, (width, width)) * (2 / width) ** 0.5


@functools.partial(jax.jit, static_argnums=(1, 2))
def batch(key: jax.Array, rows: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Noisy rows around a prototype for each class, and its answer."""
    inputs, outputs = jax.random.normal(jax.random.key(1), (2, CLASSES, width))
    chosen = jax.random.randint(key, (rows,), 0, CLASSES)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (rows, width))
    return (inputs[chosen] + noise) / 2**0.5, outputs[chosen]


def planned(function: Callable, *args: Any, donate: tuple[int, ...] = ()) -> float:
    """Gigabytes that a compiled function holds with its arguments and results."""
    with warnings.catch_warnings():
        # Columns are refreshed and not written over.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        compiled = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes
    return (held - plan.alias_size_in_bytes + plan.temp_size_in_bytes) / 1e9


def plans(options: Options) -> list[dict[str, Any]]:
    """What the compiler plans to hold in each part of training."""
    size = options.width, options.width
    struct = jax.ShapeDtypeStruct
    params = {f"{i:02}": struct(size, jnp.float32) for i in range(options.depth)}
    args = (struct((options.rows, options.width), jnp.float32),) * 2
    tx = optax.adam(options.learning_rate)
    training = dsbp_jax.spectral_coordinates(loss_fn, options.rank)
    init = lambda params, *args: training.init(params, *args, key=jax.random.key(0))
    coords, frame = jax.eval_shape(init, params, *args)

    def adam(params: Any, opt_state: Any, *args: Any) -> Any:
        grads = jax.grad(loss_fn)(params, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(coords: Any, opt_state: Any, frame: Any, *args: Any) -> Any:
        _, grads, seen = training.value_and_grad(
            coords, frame, *args, observe=True, turn=0
        )
        updates, opt_state = tx.update(grads, opt_state, coords)
        return optax.apply_updates(coords, updates), opt_state, seen

    fold = functools.partial(training.fold, turn=0)
    state, moments = (jax.eval_shape(tx.init, tree) for tree in (params, coords))
    parts = {
        "init": planned(init, params, *args, donate=(0,)),
        "step": planned(step, coords, moments, frame, *args, donate=(0, 1)),
        "fold": planned(fold, coords, frame, moments, *args, donate=(0, 1, 2)),
        "merge": planned(training.merge, coords, frame, donate=(1,)),
        "kernels": sum(leaf.size * 4 for leaf in params.values()) / 1e9,
        "plain Adam": planned(adam, params, state, *args, donate=(0, 1)),
    }
    return [{"what": name, "planned GB": held} for name, held in parts.items()]


def train(options: Options) -> list[dict[str, Any]]:
    """Every step: its loss, its seconds, and the resident peak until then."""
    key = jax.random.key(0)
    draw = lambda number: batch(
        jax.random.fold_in(key, number), options.rows, options.width
    )
    training = dsbp_jax.spectral_training(
        loss_fn,
        optax.adam(options.learning_rate),
        options.rank,
        fold_every=options.fold_every,
    )
    params = {
        f"{i:02}": jax.block_until_ready(
            kernel(jax.random.fold_in(key, i), options.width)
        )
        for i in range(options.depth)
    }
    begin = time.perf_counter()
    state = training.init(params, *draw(0), key=key, donate=True)
    jax.block_until_ready(state)
    rows = []

    def note(step: str, loss: Any, since: float) -> None:
        seconds = time.perf_counter() - since
        rows.append(
            {
                "step": step,
                "loss": loss,
                "seconds": seconds,
                "peak GB": process.peak_gigabytes(),
            }
        )
        print(*(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    note("init", "", begin)
    for number in range(options.steps):
        args, begin = draw(number), time.perf_counter()
        state, loss = training.step(state, *args)
        jax.block_until_ready(state)
        note(str(number), float(loss), begin)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        report.check_file(options.out)
    size = f"{options.depth} layers of {options.width}², {options.rows} rows"
    trained = train(options)  # first: what plans hold while they compile is no part
    tables = {
        f"Training of {size}": trained,
        f"Plans for {size}": plans(options),
    }
    report.show(tables, console, options.out)


if __name__ == "__main__":
    main()
