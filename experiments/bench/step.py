"""A training step: spectral against plain, in time, memory and state, all included."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from experiments import checks
from experiments.bench.timing import interleave
from experiments.optimizers.gradients import PART

DEPTH = 4
HEAD = 64  # the width of a head
EVERY = 20  # steps between two refreshes or folds

Name = Literal["sgd", "momentum", "adam"]
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Which steps are timed."""

    models: tuple[Literal["mlp", "transformer"], ...] = ("mlp", "transformer")
    """Four square layers, or two pre-norm blocks with attention over 128 tokens."""

    widths: tuple[int, ...] = (1024, 2048)
    """Width of the layers; a block's inner width is twice that."""

    tokens: tuple[int, ...] = (2048,)
    """Rows of a batch."""

    ranks: tuple[int, ...] = (64,)
    """Columns."""

    optimizers: tuple[Name, ...] = ("sgd", "adam")
    """Base optimizers."""

    peers: bool = True
    """Also galore, muon, spectral_muon and LoRA."""

    memory: bool = True
    """Also the temporary memory of gradients, of models of fixed size."""

    rounds: int = 7
    """Timed rounds."""

    def __post_init__(self):
        """Checks every value."""
        checks.some("step.models", self.models)
        checks.some("step.optimizers", self.optimizers)
        for name in ("widths", "tokens", "ranks"):
            checks.counts(f"step.{name}", getattr(self, name), checks.MOST_WIDE)
        check_widths("step", self.models, self.widths)
        checks.count("step.rounds", self.rounds)


def check_widths(table: str, models: Sequence[str], widths: Sequence[int]) -> None:
    """Transformers have heads of one width, at least one of them."""
    if "transformer" in models and min(widths) < HEAD:
        raise ValueError(
            f"{table}.widths={tuple(widths)!r}; accepted are {HEAD} or more, the width "
            "of a head of the transformer, or the model mlp"
        )


class Problem(NamedTuple):
    """A loss, its parameters and a batch."""

    loss: Callable[..., jax.Array]
    params: Any
    x: jax.Array


def mlp(
    width: int,
    tokens: int,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    depth: int = DEPTH,
) -> Problem:
    """Square layers without biases, and a squared error."""
    keys = jax.random.split(jax.random.key(0), depth + 1)
    params = {
        f"layer{i}": jax.random.normal(keys[i], (width, width)) * np.sqrt(2 / width)
        for i in range(depth)
    }

    def loss(params: Any, x: jax.Array) -> jax.Array:
        h = x
        for name in list(params)[:-1]:
            h = activation(h @ params[name])
        return jnp.mean((h @ params[list(params)[-1]]) ** 2)

    return Problem(loss, params, jax.random.normal(keys[-1], (tokens, width)))


def transformer(width: int, tokens: int, depth: int = 2, inner: int = 2) -> Problem:
    """Pre-norm blocks of attention over 128 tokens, heads of 64, and a gelu MLP."""
    heads, length = width // HEAD, min(128, tokens)
    shapes = {
        "query": (width, heads, HEAD),
        "key": (width, heads, HEAD),
        "value": (width, heads, HEAD),
        "out": (heads, HEAD, width),
        "up": (width, inner * width),
        "down": (inner * width, width),
    }
    key = jax.random.key(0)
    params = {
        f"block{i}": {
            name: jax.random.normal(jax.random.fold_in(key, 10 * i + j), shape)
            * (inner * width if name == "down" else width) ** -0.5
            for j, (name, shape) in enumerate(shapes.items())
        }
        for i in range(depth)
    }
    norm = lambda h: h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        h = x
        for block in params.values():
            project = lambda name, h, block=block: jnp.einsum(
                "bse,ehd->bshd", h, block[name]
            )
            seen = norm(h)
            scores = jnp.einsum(
                "bqhd,bkhd->bhqk", project("query", seen), project("key", seen)
            )
            mixed = jnp.einsum(
                "bhqk,bkhd->bqhd", jax.nn.softmax(scores / 8), project("value", seen)
            )
            h = h + jnp.einsum("bqhd,hde->bqe", mixed, block["out"])
            h = h + jax.nn.gelu(norm(h) @ block["up"]) @ block["down"]
        return jnp.mean((h - x) ** 2)

    x = jax.random.normal(jax.random.key(1), (tokens // length, length, width))
    return Problem(loss, params, x)


PROBLEMS = {"mlp": mlp, "transformer": transformer}


class Method(NamedTuple):
    """A way to train: its step, what it carries, and what it does now and then."""

    step: Callable[[Any, jax.Array], Any]
    carry: Any
    fold: Callable[[Any, jax.Array], Any] | None
    state: Any


def plain(problem: Problem, tx: optax.GradientTransformation) -> Method:
    """`jax.grad` and an optimizer."""

    def step(carry: Any, x: jax.Array) -> Any:
        params, opt_state = carry
        grads = jax.grad(problem.loss)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(problem.params)
    return Method(step, (problem.params, opt_state), None, opt_state)


def sketched(
    problem: Problem,
    tx: optax.GradientTransformation,
    rank: int,
    refresh_every: int | None = None,
) -> Method:
    """`spectral_backprop`, its refreshes in the step or else on a part of a batch."""
    backprop = dsbp_jax.spectral_backprop(
        problem.loss, rank, refresh_every=refresh_every
    )

    def step(carry: Any, x: jax.Array) -> Any:
        params, opt_state, state = carry
        _, grads, state = backprop.value_and_grad(params, state, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    def fold(carry: Any, x: jax.Array) -> Any:
        params, opt_state, state = carry
        return params, opt_state, backprop.refresh(params, state, x)

    state = jax.jit(backprop.init)(problem.params, problem.x, key=jax.random.key(2))
    opt_state = tx.init(problem.params)
    return Method(step, (problem.params, opt_state, state), fold, opt_state)


def coordinates(
    problem: Problem, tx: optax.GradientTransformation, rank: int
) -> Method:
    """`spectral_coordinates`, folded on a part of a batch."""
    training = dsbp_jax.spectral_coordinates(problem.loss, rank)

    def step(carry: Any, x: jax.Array) -> Any:
        coords, frame, opt_state = carry
        _, grads = training.value_and_grad(coords, frame, x)
        updates, opt_state = tx.update(grads, opt_state, coords)
        return optax.apply_updates(coords, updates), frame, opt_state

    def fold(carry: Any, x: jax.Array) -> Any:
        return training.fold(*carry, x)

    init = jax.jit(training.init)
    coords, frame = init(problem.params, problem.x, key=jax.random.key(2))
    opt_state = tx.init(coords)
    return Method(step, (coords, frame, opt_state), fold, opt_state)


def lora(problem: Problem, tx: optax.GradientTransformation, rank: int) -> Method:
    """Frozen kernels with a trained low-rank product beside each (MLP only)."""
    width = problem.x.shape[-1]
    frozen = problem.params

    def loss(factors: Any, frozen: Any, x: jax.Array) -> jax.Array:
        h = x
        for i, name in enumerate(frozen):
            a, b = factors[name]
            h = h @ frozen[name] + (h @ a) @ b
            h = jax.nn.relu(h) if i + 1 < len(frozen) else h
        return jnp.mean(h**2)

    def step(carry: Any, x: jax.Array) -> Any:
        factors, opt_state, frozen = carry
        grads = jax.grad(loss)(factors, frozen, x)
        updates, opt_state = tx.update(grads, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, frozen

    down = jax.random.normal(jax.random.key(3), (width, rank)) * width**-0.5
    factors = {name: (down + 0, jnp.zeros((rank, width))) for name in frozen}
    opt_state = tx.init(factors)
    return Method(step, (factors, opt_state, frozen), None, opt_state)


def methods(
    problem: Problem, model: str, base: str, rank: int, peers: bool
) -> Iterator[tuple[str, Method]]:
    """Everything that is compared, built one by one."""
    tx = OPTIMIZERS[base]()
    yield "plain", plain(problem, tx)
    yield "spectral_backprop", sketched(problem, tx, rank)
    yield "spectral_coordinates", coordinates(problem, tx, rank)
    if peers and model == "mlp":
        yield "LoRA", lora(problem, tx, rank)
    if peers and base == "adam":
        galore = optax.contrib.galore(1e-3, rank=rank, update_proj_gap=10**6)
        yield "galore, between refreshes", plain(problem, galore)
        yield "muon", plain(problem, optax.contrib.muon(1e-3))
        hidden = dsbp_jax.roles(problem.loss, problem.params, problem.x)
        ours = dsbp_jax.spectral_muon(1e-3, rank, hidden=hidden)
        yield "spectral_muon", plain(problem, ours)


class _Runner:
    """Runs a compiled step again and again on a state that it owns."""

    def __init__(self, method: Method, x: jax.Array):
        # Buffers of its own, each leaf apart: all of them are donated.
        self.carry = jax.tree.map(jnp.copy, method.carry)
        part = x[: max(1, x.shape[0] // PART)]
        compile_ = lambda fn, x: (
            jax.jit(fn, donate_argnums=0).lower(self.carry, x).compile()
        )
        self._step = compile_(method.step, x)
        self._fold = method.fold and compile_(method.fold, part)
        self._x, self._part = x, part
        analysis = self._step.memory_analysis()
        self.temp = analysis.temp_size_in_bytes if analysis else float("nan")

    def step(self) -> Any:
        self.carry = self._step(self.carry, self._x)
        return self.carry

    def fold(self) -> Any:
        self.carry = self._fold(self.carry, self._part)
        return self.carry

    @property
    def folds(self) -> bool:
        return self._fold is not None


def state_bytes(tree: Any) -> int:
    """Of the arrays of a state, counters left out."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim)


def measure(
    model: str, width: int, tokens: int, rank: int, base: str, config: StepConfig
) -> list[dict[str, Any]]:
    """The rows of one table."""
    problem = PROBLEMS[model](width, tokens)
    runners, states = {}, {}
    for name, method in methods(problem, model, base, rank, config.peers):
        runners[name], states[name] = (
            _Runner(method, problem.x),
            state_bytes(method.state),
        )
    functions = {name: runner.step for name, runner in runners.items()}
    functions |= {
        f"{name}/fold": runner.fold for name, runner in runners.items() if runner.folds
    }
    times = interleave(functions, config.rounds)
    reference = float(np.median(times["plain"]))
    rows = []
    for name, runner in runners.items():
        step = float(np.median(times[name]))
        fold = float(np.median(times[f"{name}/fold"])) if runner.folds else 0.0
        mean = step + fold / EVERY
        rows.append(
            {
                "method": name,
                "step ms": step * 1e3,
                "refresh ms": fold * 1e3,
                "mean ms": mean * 1e3,
                "mean / plain": mean / reference,
                "share of refresh": fold / EVERY / mean,
                "worst / median": (step + fold) / step,
                "temp MB": runner.temp / 1e6,
                "temp / plain": runner.temp / max(runners["plain"].temp, 1),
                "state / plain": states[name] / max(states["plain"], 1),
            }
        )
    return rows


def memory() -> list[dict[str, Any]]:
    """Temporary memory of the gradient alone, sketched over plain."""
    rows = []
    gradients = {
        f"MLP of 8 layers, width 1024, 4096 rows, {activation.__name__}": mlp(
            1024, 4096, activation, depth=8
        )
        for activation in (jax.nn.relu, jax.nn.gelu, jnp.tanh)
    }
    gradients["Transformer of 4 blocks, width 512, 2048 tokens"] = transformer(
        512, 2048, depth=4, inner=4
    )
    for name, problem in gradients.items():
        args = problem.params, problem.x
        backprop = dsbp_jax.spectral_backprop(problem.loss, refresh_every=None)
        automatic = dsbp_jax.spectral_backprop(problem.loss)
        init = functools.partial(backprop.init, key=jax.random.key(0))
        state = jax.eval_shape(init, *args)
        temp = lambda fn, *args: (
            jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
        )
        plain = temp(jax.value_and_grad(problem.loss), *args)
        with_state = problem.params, state, problem.x
        rows.append(
            {
                "model": name,
                "plain MB": plain / 1e6,
                "sketched / plain": temp(backprop.value_and_grad, *with_state) / plain,
                "with its refresh": temp(automatic.value_and_grad, *with_state) / plain,
            }
        )
    return rows


def run(config: StepConfig = StepConfig()) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    tables = {}
    if config.memory:
        tables["Temporary memory of a gradient, rank 64"] = memory()
    for model in config.models:
        for width in config.widths:
            for tokens in config.tokens:
                for rank in config.ranks:
                    for base in config.optimizers:
                        title = f"{model}, width {width}, {tokens} tokens, rank {rank}"
                        tables[f"{title}, {base}"] = measure(
                            model, width, tokens, rank, base, config
                        )
    return tables
