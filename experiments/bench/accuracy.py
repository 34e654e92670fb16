"""Loss and accuracy of spectral training, at equal steps and at equal wall time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.axes import Axes

from experiments import checks, comparison, data, optimizers, report
from experiments.bench.timing import interleave
from experiments.comparison import Contender, Outcome
from experiments.config import Config, DataConfig, ModelConfig
from experiments.loop import total_steps
from experiments.optimizers import OptimizerConfig
from experiments.steps import Classifier


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """What is trained, and how long."""

    data_dir: Path | None = None
    """Folder of the data sets."""

    task: Literal["fashion_mnist", "cifar10", "cifar10_balanced"] = "fashion_mnist"
    """An MLP 2048×3 on Fashion-MNIST, or a small ViT on CIFAR-10 or a part of it."""

    optimizers: tuple[str, ...] = ("adam", "adam+coordinates")
    """What is compared, with the first; +spectral and +coordinates say where its
    gradients come from."""

    rank: int = 64
    """Columns."""

    tracking: int | None = None
    """Columns that follow the gradient."""

    refresh_every: int = 20
    """Steps between two refreshes or folds."""

    catch_up_every: int | None = None
    """Steps after which one of a sketch is exact and makes up for the others."""

    grid: tuple[float, ...] = ()
    """Learning rates to choose from on the validation split, for all alike; by default
    the grid of the first optimizer."""

    seeds: int = 3
    """Runs of each."""

    epochs: int = 3
    """Passes over the training set, of the first."""

    batch_size: int = 512
    """Images in a step."""

    def __post_init__(self):
        """Checks every value."""
        for name in ("rank", "refresh_every", "seeds", "epochs", "batch_size"):
            checks.count(f"accuracy.{name}", getattr(self, name))
        if self.tracking is not None:
            checks.between("accuracy.tracking", self.tracking, 0, self.rank)
        if self.catch_up_every is not None:
            checks.count("accuracy.catch_up_every", self.catch_up_every, 2)
        checks.some("accuracy.optimizers", self.optimizers)
        for name in self.optimizers:
            optimizers.named(_config(self).optimizer, name)
        for rate in self.grid:
            checks.positive("accuracy.grid", rate)
        refresh, late = self.refresh_every, self.catch_up_every
        sketched = any(name.endswith("+spectral") for name in self.optimizers)
        if (
            sketched
            and self.tracking
            and late
            and not (refresh % late and late % refresh)
        ):
            raise ValueError(
                f"accuracy.refresh_every={refresh} with accuracy.catch_up_every={late};"
                " accepted are periods of which none divides the other, so that their "
                "steps can be timed apart"
            )


_VIT = ModelConfig("vit", {"dim": 256, "depth": 4, "heads": 4, "patch": 8})
TASKS = {
    "fashion_mnist": (
        "fashion_mnist",
        ModelConfig("mlp", {"hidden": (2048, 2048, 2048)}),
    ),
    "cifar10": ("cifar10", _VIT),
    "cifar10_balanced": ("cifar10_balanced", _VIT),
}


def _config(config: AccuracyConfig) -> Config:
    name, model = TASKS[config.task]
    return Config(
        data=DataConfig(name=name, data_dir=config.data_dir),
        model=model,
        optimizer=OptimizerConfig(
            rank=config.rank,
            tracking=config.tracking,
            refresh_every=config.refresh_every,
            catch_up_every=config.catch_up_every,
        ),
        epochs=config.epochs,
        batch_size=config.batch_size,
    )


def load_data(config: AccuracyConfig) -> data.Dataset:
    """The images of the task, as many as a batch or more.

    Raises:
      ValueError: If they are not there, or fewer.
    """
    name, _ = TASKS[config.task]
    dataset = data.load(name, data_dir=config.data_dir)
    total_steps(dataset, _config(config))
    return dataset


def picture(config: AccuracyConfig) -> Path:
    """Where the plot goes."""
    return Path("runs") / f"accuracy-{config.task}-{config.optimizers[0]}.svg"


def seconds_per_step(
    contenders: dict[str, Contender], rounds: int = 7
) -> dict[str, float]:
    """The mean time of a step, refreshes included, measured side by side."""
    functions: dict[str, Callable[[], Any]] = {}
    for name, contender in contenders.items():
        trainer = contender.trainer
        trainer.compile()
        batch = trainer.classifier.dataset.train.take(
            np.arange(trainer.config.batch_size)
        )
        held = [trainer.init(0)]
        args = batch.images, batch.labels, jax.random.key(0), jax.numpy.float32(1e-4)

        def step(number: int, trainer=trainer, held=held, args=args) -> Any:
            held[0], metrics = trainer.train_step(held[0], *args, step=number)
            return metrics

        for kind, number in _kinds(contender).items():
            functions[f"{name}/{kind}"] = lambda step=step, n=number: step(n)
    times = {k: float(np.median(v)) for k, v in interleave(functions, rounds).items()}
    means = {}
    for name, contender in contenders.items():
        plain = times[f"{name}/plain"]
        means[name] = plain + sum(
            (times[f"{name}/{kind}"] - plain) / number
            for kind, number in _kinds(contender).items()
            if kind != "plain"
        )
    return means


def _kinds(contender: Contender) -> dict[str, int]:
    """For each kind of step a number that makes it one, and no other."""
    trainer = contender.trainer
    kinds = {
        "plain": 1,
        "refresh": trainer.every,
        "catch up": trainer.catch_up_every,
    }
    return {kind: number for kind, number in kinds.items() if number}


def run(config: AccuracyConfig = AccuracyConfig()) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title; a plot is written to `runs/`."""
    base = _config(config)
    dataset = load_data(config)
    classifier = Classifier(dataset, base.model)
    steps = total_steps(dataset, base)
    first = config.optimizers[0]
    # A contender is given gradient evaluations, of which SAM needs two in a step.
    evaluations = lambda name: (
        optimizers.OPTIMIZERS[optimizers.named(base.optimizer, name).name].evaluations
    )
    build = lambda name, steps: Contender(
        classifier, base, name, steps * evaluations(name)
    )
    contenders = {name: build(name, steps) for name in config.optimizers}
    grid = config.grid or contenders[first].entry.grid
    cost = seconds_per_step(contenders)

    rates, tuning, finals = {}, {}, {}
    for name, contender in contenders.items():
        print(f"{name}: {cost[name] * 1e3:.0f} ms a step", flush=True)
        outcomes = [contender.run(0, rate, test=False) for rate in grid]
        rates[name] = comparison.best_learning_rate(outcomes)
        tuning[name] = outcomes
        for o in outcomes:
            print(f"  rate {o.learning_rate:g}: {o.validation}", flush=True)
    for name, contender in contenders.items():
        finals[name] = [
            contender.run(seed, rates[name], test=True) for seed in range(config.seeds)
        ]
        print(name, [o.test["accuracy"] for o in finals[name]], flush=True)
    # The others get the steps that take as long as all of the first.
    timed = {first: finals[first]}
    lengths = {name: round(steps * cost[first] / cost[name]) for name in contenders}
    longer = {name: build(name, lengths[name]) for name in config.optimizers}
    for name in config.optimizers[1:]:
        timed[name] = [
            longer[name].run(seed, rates[name], test=True)
            for seed in range(config.seeds)
        ]
        print(name, "timed", [o.test["accuracy"] for o in timed[name]], flush=True)
    grids = dict.fromkeys(config.optimizers, grid)
    title = f"{config.task}, rank {config.rank}, {config.seeds} seeds"
    equal_steps = comparison.make_rows(list(contenders.values()), finals, grids)
    equal_time = comparison.make_rows(list(longer.values()), timed, grids)
    plot(picture(config), finals, contenders, cost)
    tables = {
        f"{title}, {steps} steps": [
            _row(row, finals[row.name], cost) for row in equal_steps
        ],
        f"{title}, the time of {steps} steps of {first}": [
            _row(row, timed[row.name], cost) for row in equal_time
        ],
        "Tuning on validation": [
            {
                "method": name,
                "rate": o.learning_rate,
                "validation accuracy, %": 100 * o.validation["accuracy"],
                "validation loss": o.validation["loss"],
            }
            for name, outcomes in tuning.items()
            for o in outcomes
        ],
    }
    return tables


def _row(
    row: comparison.Row, outcomes: list[Outcome], cost: dict[str, float]
) -> dict[str, Any]:
    percent = lambda value: "" if value is None else 100 * value
    return {
        "method": row.name,
        "rate": row.learning_rate,
        "steps": row.steps,
        "ms per step": cost[row.name] * 1e3,
        "test accuracy, %": percent(row.mean),
        "± standard error": percent(row.error),
        "difference": percent(row.difference),
        "± its error": percent(row.difference_error),
        "p": "" if row.p_value is None else row.p_value,
        "test loss": float(np.mean([o.test["loss"] for o in outcomes])),
    }


def plot(
    path: Path,
    finals: dict[str, list[Outcome]],
    contenders: dict[str, Contender],
    cost: dict[str, float],
) -> None:
    """Validation accuracy and loss over steps and over time, means over seeds."""

    def panel(column: int, label: str, timed: bool) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for name, outcomes in finals.items():
                curves = np.array([o.curve for o in outcomes if not o.diverged])
                if not len(curves):
                    continue
                x = curves[0, :, 0] / contenders[name].cost
                x = x * cost[name] if timed else x
                axis.plot(x, curves[:, :, column].mean(0), marker=".", label=name)
            axis.set(
                xlabel="seconds of training" if timed else "steps",
                ylabel=f"validation {label}",
            )
            axis.legend()

        return draw

    panels = [
        panel(column, label, timed)
        for column, label in ((1, "accuracy"), (2, "loss"))
        for timed in (False, True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.figure(panels), encoding="utf-8")
