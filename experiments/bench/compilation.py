"""What a user waits for first: making the state, tracing, compiling, and one step.

Each program is built from empty caches, the contenders in turn, in one process.
Whatever jax keeps on the disk is left out.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dsbp_jax
from experiments import checks
from experiments.bench.step import (
    Method,
    Problem,
    coordinates,
    plain,
    sketched,
)
from experiments.models.resnet import ResNet18
from experiments.models.vit import EncoderBlock
from experiments.optimizers import Uses, dimension_numbers

# What counts as an instruction in the text of a compiled program.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", re.MULTILINE)

DEPTH, WIDTH, HEADS, BATCH, TOKENS = 12, 256, 4, 8, 128
RANK, EVERY = 32, 10
NUM_LEAVES, SIDE = 50, 256

Name = Literal["unrolled", "scanned", "resnet18", "leaves"]


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """Which programs are compiled."""

    models: tuple[Name, ...] = ("unrolled", "scanned", "resnet18", "leaves")
    """Twelve Transformer blocks unrolled or scanned, ResNet-18, the update alone of
    50 equal leaves beside that of one."""

    rounds: int = 3
    """How often each program is compiled."""

    def __post_init__(self):
        """Checks every value."""
        checks.some("compile.models", self.models)
        for name in self.models:
            checks.one_of("compile.models", name, MODELS)
        checks.count("compile.rounds", self.rounds)


class Seconds(NamedTuple):
    """What one program costs before its second step."""

    init: float
    trace: float
    lower: float
    compile: float
    step: float


class Contenders(NamedTuple):
    """What is compared on one problem.

    Attributes:
      methods: By name, each built when it is called.
      x: The batch.
    """

    methods: dict[str, Callable[[], Method]]
    x: jax.Array


def blocks(*, scanned: bool) -> Problem:
    """Transformer blocks of flax nnx, one after the other or as one loop."""
    make = lambda seed: EncoderBlock(
        WIDTH, HEADS, 4 * WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(seed)
    )
    graph, _ = nnx.split(make(0))
    states = [nnx.to_pure_dict(nnx.state(make(seed))) for seed in range(DEPTH)]
    apply = lambda h, params: nnx.merge(graph, params)(h)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        h = x
        for name in params:
            h = apply(h, params[name])
        return jnp.mean((h - x) ** 2)

    def loss_of_stack(params: Any, x: jax.Array) -> jax.Array:
        h, _ = jax.lax.scan(lambda h, block: (apply(h, block), None), x, params)
        return jnp.mean((h - x) ** 2)

    x = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, WIDTH))
    if scanned:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return Problem(loss_of_stack, stacked, x)
    return Problem(loss, {f"block{i:02}": p for i, p in enumerate(states)}, x)


def resnet18(batch: int = 8) -> Problem:
    """ResNet-18 with its batch statistics, on images of 32 x 32."""
    model = ResNet18((32, 32, 3), 10, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graph, params, rest, copy=True)(x) ** 2)

    return Problem(
        loss,
        nnx.to_pure_dict(params),
        jax.random.normal(jax.random.key(1), (batch, 32, 32, 3)),
    )


def training(problem: Problem) -> Contenders:
    """Whole training steps by name, each built when it is called."""
    layout = dsbp_jax.layout(problem.loss, problem.params, problem.x)
    adam = optax.adam(1e-3)
    found = {
        **{
            name: functools.partial(plain, problem, tx)
            for name, tx in transforms(layout).items()
        },
        "spectral_backprop": lambda: sketched(problem, adam, RANK, EVERY),
        "spectral_coordinates": lambda: coordinates(problem, adam, RANK),
    }
    return Contenders(found, problem.x)


def transforms(layout: dsbp_jax.Layout) -> dict[str, optax.GradientTransformation]:
    """Optimizers by name, ours and optax's."""
    adam = optax.adam(1e-3)
    shared = {"refresh_every": EVERY, "layout": layout}
    numbers = dimension_numbers(optax.contrib.MuonDimensionNumbers, Uses(layout))
    return {
        "adam": adam,
        "muon": optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers),
        "spectral_projection": optax.chain(
            dsbp_jax.spectral_projection(RANK, **shared), optax.sgd(0.1)
        ),
        "dsbp": dsbp_jax.dsbp(0.1, RANK, **shared),
        "spectral_subspace(adam)": dsbp_jax.spectral_subspace(adam, RANK, **shared),
        "lie_rotation": dsbp_jax.lie_rotation(0.1, rank=RANK, **shared),
        "spectral_muon": dsbp_jax.spectral_muon(0.1, RANK, layout=layout),
    }


def updates(count: int) -> Contenders:
    """The updates alone of so many kernels of one shape."""
    kernel = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    params = {f"kernel{i:02}": kernel + i for i in range(count)}
    # The gradient by each kernel is a constant: next to nothing to compile beside.
    problem = Problem(
        lambda params, x: sum(jnp.vdot(x, leaf) for leaf in params.values()),
        params,
        kernel,
    )
    view = dsbp_jax.MatrixView((0,), (1,))
    layout = dsbp_jax.Layout((path, view) for path in params)
    found = {
        name: functools.partial(plain, problem, tx)
        for name, tx in transforms(layout).items()
    }
    return Contenders(found, kernel)


MODELS: dict[str, Callable[[], dict[str, Contenders]]] = {
    "unrolled": lambda: {
        f"{DEPTH} Transformer blocks, unrolled": training(blocks(scanned=False))
    },
    "scanned": lambda: {
        f"{DEPTH} Transformer blocks, scanned": training(blocks(scanned=True))
    },
    "resnet18": lambda: {"ResNet-18": training(resnet18())},
    "leaves": lambda: {
        f"Update of {count} kernels of {SIDE} x {SIDE}": updates(count)
        for count in (1, NUM_LEAVES)
    },
}


def build(method: Method, x: jax.Array, seconds: float) -> Iterator[tuple[str, Any]]:
    """Compiles what a method does: its step, and its fold where it has one."""
    for name, function in (("", method.step), (", fold", method.fold)):
        if function is None:
            continue
        times = [time.perf_counter()]

        def lap(times: list[float] = times) -> None:
            times.append(time.perf_counter())

        traced = jax.jit(function).trace(method.carry, x)
        lap()
        lowered = traced.lower()
        lap()
        compiled = lowered.compile()
        lap()
        jax.block_until_ready(compiled(method.carry, x))
        lap()
        count = len(_INSTRUCTION.findall(compiled.as_text()))
        yield name, (Seconds(seconds, *np.diff(times)), count)


def measure(contenders: Contenders, rounds: int) -> list[dict[str, Any]]:
    """The rows of one table: medians over rounds, from empty caches."""
    found: dict[str, list[Seconds]] = {}
    counts: dict[str, int] = {}
    for _ in range(rounds):
        for label, make in contenders.methods.items():
            jax.clear_caches()
            start = time.perf_counter()
            method = make()
            jax.block_until_ready(method.carry)
            init = time.perf_counter() - start
            for name, (seconds, count) in build(method, contenders.x, init):
                found.setdefault(label + name, []).append(seconds)
                counts[label + name] = count
    rows = []
    whole = lambda times: np.median([t.trace + t.lower + t.compile for t in times])
    reference = whole(found["adam"])
    for label, times in found.items():
        rows.append(
            {
                "what": label,
                **{
                    f"{field} s": float(np.median([getattr(t, field) for t in times]))
                    for field in Seconds._fields
                },
                "trace + compile s": float(whole(times)),
                "over adam": float(whole(times) / reference),
                "instructions": counts[label],
            }
        )
    return rows


def run(config: CompileConfig) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    tables = {}
    keeps = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for name in config.models:
            for title, contenders in MODELS[name]().items():
                tables[title] = measure(contenders, config.rounds)
    finally:
        jax.config.update("jax_enable_compilation_cache", keeps)
    return tables
