"""One method with one seed for so much time: a cell of a comparison, in its file."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from experiments import runs
from experiments.config import from_json, to_json
from experiments.fewshot import training
from experiments.fewshot.config import FewshotConfig
from experiments.loop import Diverged

FIRST_TEST = 500  # outer steps; each further test at twice as many
_NO_PART = ("outer.steps", "outer.minutes", "eval_every")  # in what a cell measures


@dataclasses.dataclass(frozen=True)
class Cell:
    """What its file holds.

    Attributes:
      config: The experiment, as JSON.
      ran_on: Versions and device.
      steps: Outer steps.
      seconds: Training time.
      tests: What `Learner.evaluate` measured after so many steps.
      last: What it measured at the end; None where the cell diverged.
      diverged: At which step it diverged, in words, or None.
    """

    config: dict[str, Any]
    ran_on: dict[str, str]
    steps: int
    seconds: float
    tests: dict[str, dict[str, Any]]
    last: dict[str, Any] | None
    diverged: str | None

    def value(self, step: str | None = None) -> float:
        """Per cent of accuracy, or the loss: at the end, or after so many steps."""
        measured = self.last if step is None else self.tests[step]
        if "accuracy" in measured:
            return 100 * measured["accuracy"]["mean"]
        return measured["loss"]["mean"]

    @property
    def merit(self) -> float:
        """What to choose learning rates by: higher is better."""
        if self.diverged:
            return -math.inf
        value = self.value() if "accuracy" in self.last else -self.value()
        return value if math.isfinite(value) else -math.inf

    def text(self) -> str:
        """One line on how it went."""
        if self.diverged:
            return f"diverged: {self.diverged}"
        return f"{self.value():.4g} after {self.steps} steps in {self.seconds:.0f} s"


def train_cell(
    folder: Path, config: FewshotConfig, minutes: float, *, test: bool = True
) -> Cell:
    """Trains a cell, or reads it where it was trained before.

    Args:
      folder: Of the cells.
      config: The experiment, with its seed.
      minutes: Its training time.
      test: Whether to measure on test tasks, on the way as well; without, the cell is
        for tuning and measured on validation tasks.

    Returns:
      The cell.

    Raises:
      ValueError: There is one of the same name with another config, or from another
        machine.
    """
    inner, outer = config.inner.learning_rate, config.outer.learning_rate
    stem = f"{config.method}-{inner:g}-{outer:g}-seed{config.seed}-{minutes:g}min"
    path = folder / f"{stem}{'' if test else '-tuning'}.json"
    if path.is_file():
        try:
            cell = Cell(**json.loads(path.read_text(encoding="utf-8")))
            before = from_json(FewshotConfig, cell.config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cannot read {path}: {error}; accepted is to remove it, or another "
                "--name"
            ) from None
        runs.check_unchanged(
            config,
            before,
            besides=(*_NO_PART, "eval_episodes" if test else "test_episodes"),
            instead="another --name",
        )
        if cell.ran_on != runs.environment():
            raise ValueError(
                f"{path} ran on {cell.ran_on}; accepted are cells of this machine, "
                f"{runs.environment()}, or another --name"
            )
        return cell
    learner = training.make_learner(config)
    state = learner.init(config.seed)
    learner.compile(state)
    episodes = config.test_episodes if test else config.eval_episodes

    def measure() -> dict[str, Any]:
        # Test tasks go with the seed, so that the spread over seeds has their part in
        # it; methods share them. Rates are chosen on the same validation tasks.
        drawn = (
            {"part": "test", "seed": config.seed} if test else {"part": "validation"}
        )
        measured = learner.evaluate(state, episodes=episodes, **drawn)
        if not math.isfinite(measured["loss"]["mean"]):
            raise Diverged(f"the {drawn['part']} loss is not finite at step {steps}")
        return measured

    spent, due, tests, last, diverged = 0.0, FIRST_TEST, {}, None, None
    steps = 0
    try:
        while spent < 60 * minutes:
            state, _, seconds = training.train(
                learner,
                state,
                until=due,
                seed=config.seed,
                seconds=60 * minutes - spent,
            )
            spent, steps = spent + seconds, int(state.step)
            if steps == due:
                due *= 2
                if test:
                    tests[str(steps)] = measure()
        last = measure()
    except Diverged as error:
        diverged = str(error)
    cell = Cell(
        to_json(config), runs.environment(), steps, spent, tests, last, diverged
    )
    runs.write_json(path, dataclasses.asdict(cell))
    return cell
