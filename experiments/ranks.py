"""Which layers gain from whitening? `python -m experiments.ranks [PRESET] [--options]`.

A step along UVᵀ of a layer's gradient `G = UΣVᵀ` is promised a larger decrease of the
loss than one along G where the gradient's nuclear rank `‖G‖∗²/‖G‖²_F` is above the
stable rank `‖A‖²_F/‖A‖²₂` of what enters the layer (Davis and Drusvyatskiy, When do
spectral gradient updates help in deep learning?, arXiv 2512.04299).
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import dsbp_jax
from experiments import checks, cli, process
from experiments.bench.report import check_file, show
from experiments.config import ImageConfig, TextConfig
from experiments.study import loop
from experiments.tasks.optimized import MAX_ROWS, Optimized, TrainState

PROG = "experiments.ranks"


@dataclasses.dataclass(frozen=True)
class Ranks(cli.Command):
    """Nuclear rank of gradients over stable rank of inputs, by layer, while training.

    Prints the table, and with OUT writes it there as JSON. G is the gradient of the
    next batch, A of some thousand of its rows. Layers that are wider than a pixel or
    share their kernel with others are left out; of stacked kernels both are means.
    """

    at: tuple[int, ...] = (0, 10, 100)
    """After how many steps."""

    out: Path | None = None
    """JSON file of the table."""


def nuclear_rank(g: jax.Array) -> jax.Array:
    """`(Σσ)²/Σσ²` of a matrix `(a, b)`: 1 to min(a, b); zero for zero.

    Example:
      >>> nuclear_rank(jnp.eye(3, 2)), nuclear_rank(jnp.ones((3, 2))).round(3)
      (Array(2., dtype=float32), Array(1., dtype=float32))
    """
    values = jnp.linalg.svd(_scaled(g), compute_uv=False)
    square = jnp.sum(values**2)
    return jnp.sum(values) ** 2 / jnp.where(square > 0, square, 1)


def stable_rank(rows: jax.Array) -> jax.Array:
    """`Σσ²/maxσ²` of rows `(n, d)`: 1 to min(n, d); zero for zero.

    Example:
      >>> stable_rank(jnp.eye(3, 2)), stable_rank(jnp.diag(jnp.array([2.0, 1.0])))
      (Array(2., dtype=float32), Array(1.25, dtype=float32))
    """
    rows = _scaled(rows)
    with jax.default_matmul_precision("highest"):
        largest = jnp.linalg.eigvalsh(rows.T @ rows)[-1]
    return jnp.sum(rows**2) / jnp.where(largest > 0, largest, 1)


def _scaled(x: jax.Array) -> jax.Array:
    """A matrix in float32, its largest entry 1: squares would underflow."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x))
    return x / jnp.where(largest > 0, largest, 1)


def measure(
    task: Optimized, layout: dsbp_jax.Layout, params: Any, rest: Any, *batch: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Both ranks of every layer that alone has its kernel, and has it for one pixel."""
    capture = dsbp_jax.capture_activations(
        task.loss, max_rows=MAX_ROWS, which=("inputs",)
    )

    def loss(params: Any) -> tuple[jax.Array, Any]:
        (value, _), activations = capture(params, rest, *batch)
        return value, activations

    grads, activations = jax.grad(loss, has_aux=True)(params)
    leaves = dsbp_jax.layers.leaves_by_path(grads)
    found = {}
    for path, layer in activations.items():
        if path not in leaves or f"{path}#1" in activations:
            continue  # a kernel that several layers share
        matrices = layout[path].to_matrix(leaves[path])
        *_, window, d_in, d_out = matrices.shape
        if window > 1:
            continue
        inputs, _ = layer.rows("input")
        nuclear = jax.vmap(nuclear_rank)(matrices.reshape(-1, d_in, d_out))
        stable = jax.vmap(stable_rank)(inputs.reshape(-1, *inputs.shape[-2:]))
        found[path] = jnp.mean(nuclear), jnp.mean(stable)
    return found


def rows(command: Ranks) -> list[dict[str, Any]]:
    """One row for each point of the run and layer."""
    config = command.config
    task = config.make()
    length = task.length(config).steps
    checks.some("at", command.at)
    for step in command.at:
        checks.count("at", step, 0, length)
    uses = task.uses()
    seen = jax.jit(functools.partial(measure, task, uses.layout))
    task.compile(config)
    state: TrainState = task.init(config)
    table, step = [], 0
    for until in sorted(command.at):
        trained = loop.train(task, config, state, first=step, until=until)
        state, step = trained.state, trained.step
        batch = task.batch(config, min(step, length - 1))
        found = jax.device_get(seen(task.params(state), state.rest, *batch))
        for path in uses.layout:
            if path in found:
                nuclear, stable = map(float, found[path])
                table.append(
                    {
                        "step": str(step),
                        "layer": path,
                        "role": uses.roles.get(path, ""),
                        "nuclear rank of G": nuclear,
                        "stable rank of A": stable,
                        "ratio": nuclear / stable if stable else float("nan"),
                    }
                )
    return table


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        command = cli.parse(Ranks, args, PROG)
        if not isinstance(command.config, ImageConfig | TextConfig):
            raise ValueError(
                f"PRESET={command.preset!r} gives a {type(command.config).__name__}; "
                "accepted are presets of images or text"
            )
        check_file(command.out)
        table = rows(command)
        if not table:
            raise ValueError(
                f"model.name={command.config.model.name!r}; accepted are models with "
                "layers that are no convolutions"
            )
    title = f"{Path(command.preset).stem}, trained by {command.config.contender}"
    show({title: table}, console, command.out)


if __name__ == "__main__":
    main()
