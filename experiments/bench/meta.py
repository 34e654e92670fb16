"""What an outer step of MAML costs: tasks per second, and memory by inner steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from dsbp_jax import meta
from experiments import checks
from experiments.bench import torch_maml
from experiments.bench.timing import interleave
from experiments.config import ModelConfig
from experiments.data import FewShotSet
from experiments.fewshot_config import (
    SINE,
    FewshotConfig,
    FewshotDataConfig,
    InnerConfig,
    OuterConfig,
)
from experiments.tasks.learner import Learner

MODELS = ("mlp", "conv4")


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """What the meta-learning benchmark measures."""

    models: tuple[str, ...] = MODELS
    """mlp (sine waves, ten points) and conv4 (28 × 28 images, five ways, one shot)."""

    steps: tuple[int, ...] = (1, 5)
    """Inner steps."""

    tasks: tuple[int, ...] = (16,)
    """Tasks in an outer step."""

    chunk: int = 4
    """Tasks at once, of the row that runs them in chunks."""

    channels: int = 32
    """Of conv4."""

    rounds: int = 15
    """Timed rounds."""

    memory_steps: tuple[int, ...] = (1, 5, 10, 20)
    """Inner steps of the table of memory."""

    def __post_init__(self):
        """Checks every value."""
        checks.some("meta.models", self.models)
        for name in self.models:
            checks.one_of("meta.models", name, MODELS)
        for name in ("steps", "tasks", "memory_steps"):
            checks.counts(f"meta.{name}", getattr(self, name))
        for name in ("chunk", "channels", "rounds"):
            checks.count(f"meta.{name}", getattr(self, name), high=checks.MOST_WIDE)


def make_learner(name: str, channels: int, tasks: int = 16) -> Learner:
    """The network and tasks of a row; images are noise."""
    outer = OuterConfig(tasks=tasks)
    if name == "mlp":
        model = ModelConfig("mlp", {"hidden": (40, 40)})
        inner = InnerConfig(learning_rate=0.001)
        config = FewshotConfig(
            FewshotDataConfig(SINE), model, inner, outer=outer, shots=10, queries=10
        )
        return Learner(config, None)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 28, 28, 1), np.uint8)
    images = FewShotSet(
        "noise", noise, noise, noise, np.zeros(1, np.float32), np.ones(1, np.float32)
    )
    config = FewshotConfig(
        FewshotDataConfig("omniglot"),
        ModelConfig("conv4", {"channels": channels}),
        InnerConfig(learning_rate=0.1),
        outer=outer,
        queries=1,
    )
    return Learner(config, images)


def make_problem(config: MetaConfig, name: str, tasks: int) -> tuple:
    """A learner, its start, and a batch of tasks."""
    learner = make_learner(name, config.channels, tasks)
    given = learner.arrays, learner.draw(0, 0), learner.init(0).params
    arrays, drawn, params = jax.device_put(given, jax.devices()[0])
    return learner, params, learner.episodes.build(arrays, drawn)


def reference(learner: Learner, num_steps: int) -> Callable[..., Any]:
    """The loss of one task as one would write it, convolutions as they stand."""
    rate = learner.config.inner.learning_rate

    def task_loss(params: Any, support: Any, query: Any) -> jax.Array:
        def step(params: Any, _: None) -> tuple:
            grads = jax.grad(learner.loss)(params, support)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

        adapted, _ = jax.lax.scan(step, params, length=num_steps)
        return learner.loss(adapted, query)

    return task_loss


def loop(gradient: Callable[..., Any], params: Any, tasks: Any) -> Callable[[], Any]:
    """Runs the gradient of each task from Python, and adds them up."""
    number = jax.tree.leaves(tasks)[0].shape[0]
    one = lambda index: jax.tree.map(lambda leaf: leaf[index], tasks)
    parts = jax.block_until_ready([one(index) for index in range(number)])
    add = jax.jit(lambda a, b: jax.tree.map(jax.numpy.add, a, b))

    def run() -> Any:
        total = gradient(params, *parts[0])
        for part in parts[1:]:
            total = add(total, gradient(params, *part))
        return total

    return run


def throughput(config: MetaConfig, name: str, tasks: int) -> list[dict[str, Any]]:
    """Tasks per second of each way to run them, by inner steps."""
    learner, params, batch = make_problem(config, name, tasks)
    rows = []
    for steps in config.steps:
        inner = optax.sgd(learner.config.inner.learning_rate)
        build = lambda steps=steps, inner=inner, **options: meta.maml(
            learner.loss, inner, steps, **options
        )
        gradient = lambda learned: jax.jit(jax.grad(learned.meta_loss))
        alone = gradient(build())
        single = lambda params, support, query, alone=alone: alone(
            params, jax.tree.map(lambda leaf: leaf[None], (support, query))
        )
        task_loss = reference(learner, steps)
        over = jax.vmap(task_loss, (None, 0, 0))
        mean = lambda params, tasks, over=over: over(params, *tasks).mean()
        mapped = jax.jit(jax.grad(mean))
        runs = {
            "a Python loop": loop(jax.jit(jax.grad(task_loss)), params, batch),
            "a Python loop, this package on each": loop(single, params, batch),
            "jax.vmap of the same": lambda mapped=mapped: mapped(params, batch),
        }
        ways = {
            "task_axis='auto'": {},
            "task_axis='auto', first order": {"first_order": True},
            "task_axis='map'": {"task_axis": "map"},
            f"task_axis={config.chunk}": {"task_axis": config.chunk},
        }
        for label, options in ways.items():
            step = gradient(build(**options))
            runs[label] = lambda step=step: step(params, batch)
        runs |= torch_maml.peers(
            name,
            batch,
            num_steps=steps,
            rate=learner.config.inner.learning_rate,
            channels=config.channels,
        )
        times = interleave(runs, config.rounds)
        baseline = float(np.median(times["a Python loop"]))
        for label, seconds in times.items():
            median = float(np.median(seconds))
            rows.append(
                {
                    "inner steps": str(steps),
                    "how": label,
                    "ms": 1e3 * median,
                    "tasks / s": tasks / median,
                    "over the loop": baseline / median,
                }
            )
    return rows


def memory(config: MetaConfig, name: str, tasks: int) -> list[dict[str, Any]]:
    """Memory of the meta-gradient, by inner steps, as the compiler plans it."""
    learner, params, batch = make_problem(config, name, tasks)
    rows = []
    for steps in config.memory_steps:
        row: dict[str, Any] = {"inner steps": str(steps)}
        for label, options in {
            "second order": {},
            "second order, checkpoint": {"checkpoint": True},
            "first order": {"first_order": True},
        }.items():
            inner = optax.sgd(learner.config.inner.learning_rate)
            learned = meta.maml(learner.loss, inner, steps, **options)
            program = (
                jax.jit(jax.grad(learned.meta_loss)).lower(params, batch).compile()
            )
            planned = program.memory_analysis()
            size = planned.argument_size_in_bytes + planned.output_size_in_bytes
            row[f"{label}, MB"] = (size + planned.temp_size_in_bytes) / 1e6
        rows.append(row)
    return rows


def run(config: MetaConfig) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    tables = {}
    for name in config.models:
        for tasks in config.tasks:
            title = f"Meta-gradient of {name}, {tasks} tasks"
            tables[title] = throughput(config, name, tasks)
        tasks = config.tasks[0]
        title = f"Memory of the meta-gradient of {name}, {tasks} tasks"
        tables[title] = memory(config, name, tasks)
    return tables
