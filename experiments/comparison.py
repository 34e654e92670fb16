"""Optimizers side by side: tuned alike, at equal gradient evaluations, paired by seed.

Every optimizer gets the same number of gradient evaluations, so one that needs two
in a step gets half the steps. Learning rates are chosen on the validation split;
the test split is read once, at the end of each run that counts.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from experiments import optimizers
from experiments.config import Config
from experiments.loop import Diverged, train_epoch
from experiments.probes import Probe
from experiments.steps import Classifier, Trainer


class Outcome(NamedTuple):
    """One run.

    Attributes:
      seed: Its seed.
      learning_rate: Its peak learning rate.
      validation: Loss and accuracy at the end.
      test: Likewise, or None for a run that only chooses a learning rate.
      curve: Gradient evaluations, validation accuracy and validation loss.
      seconds: Time spent in training steps, without compilation and evaluation.
      diverged: What happened, if the loss stopped being finite.
      sharpness: Top eigenvalue at the end of the Hessian of the training loss on the
        probe's batch, in evaluation mode, where it is asked for.
    """

    seed: int
    learning_rate: float
    validation: dict[str, float]
    test: dict[str, float] | None
    curve: list[tuple[int, float, float]]
    seconds: float
    diverged: str | None
    sharpness: float | None = None


class Row(NamedTuple):
    """An optimizer in the final table.

    Attributes:
      name: Its name.
      learning_rate: The peak learning rate of its runs.
      at_edge: Whether that is the lowest or highest of those tried.
      mean: Mean test accuracy over seeds.
      error: Standard error of the mean; None for one seed.
      difference: Mean paired difference to the first optimizer; None for itself.
      difference_error: Its standard error.
      p_value: Of the paired t-test; None where there is nothing to test.
      seconds: Mean time of a run.
      steps: Steps of a run.
      diverged: Runs that diverged; they count with the accuracy they have.
      sharpness: Mean top eigenvalue of the Hessian, where it was asked for, over the
        runs that did not diverge.
      sharpness_error: Its standard error.
    """

    name: str
    learning_rate: float
    at_edge: bool
    mean: float
    error: float | None
    difference: float | None
    difference_error: float | None
    p_value: float | None
    seconds: float
    steps: int
    diverged: int
    sharpness: float | None = None
    sharpness_error: float | None = None


class Contender:
    """An optimizer with its compiled steps, shared by all its runs.

    Args:
      classifier: The model, the same for all.
      config: The experiment.
      name: The optimizer.
      evaluations: Gradient evaluations of a run.
    """

    def __init__(
        self, classifier: Classifier, config: Config, name: str, evaluations: int
    ):
        self.name = name
        # A learning rate is chosen for one optimizer; the others have the table's.
        optimizer = optimizers.named(config.optimizer, name)
        self.config = dataclasses.replace(config, optimizer=optimizer)
        self.entry = optimizers.OPTIMIZERS[optimizer.name]
        self.cost = self.entry.evaluations
        self.num_steps = max(1, evaluations // self.cost)
        self.trainer = Trainer(classifier, self.config, self.num_steps)
        self.probe = Probe(classifier, self.config, classifier.dataset.train)
        self._compiled = False

    def grid(self, chosen: Sequence[float]) -> tuple[float, ...]:
        """The learning rates to try: those chosen, or the table's."""
        return tuple(sorted(chosen)) or self.entry.grid

    def run(
        self,
        seed: int,
        learning_rate: float,
        *,
        test: bool,
        sharpness: bool = False,
        advance: Callable[[int], None] = lambda evaluations: None,
    ) -> Outcome:
        """Trains once.

        Args:
          seed: Seed of initialisation, order and augmentation.
          learning_rate: The peak learning rate.
          test: Whether to read the test split at the end.
          sharpness: Whether to measure the Hessian's top eigenvalue at the end.
          advance: Told how many gradient evaluations were done, now and then.

        Returns:
          What came of it; a run that diverged counts as it stands.
        """
        trainer, dataset = self.trainer, self.trainer.classifier.dataset
        if not self._compiled:
            trainer.compile()
            self._compiled = True
        state = trainer.init(seed)
        curve: list[tuple[int, float, float]] = []
        point = lambda steps, result: (
            steps * self.cost,
            result["accuracy"],
            result["loss"],
        )
        seconds, done, epoch, diverged = 0.0, 0, 0, None
        while done < self.num_steps:
            began = time.perf_counter()
            try:
                state, _ = train_epoch(
                    trainer,
                    state,
                    seed=seed,
                    epoch=epoch,
                    peak=learning_rate,
                    max_steps=self.num_steps - done,
                    advance=lambda steps: advance(steps * self.cost),
                )
            except Diverged as error:
                diverged = str(error)
                advance((self.num_steps - done) * self.cost)
                break
            seconds += time.perf_counter() - began
            done, epoch = int(state.step), epoch + 1
            if epoch % self.config.eval_every == 0 and done < self.num_steps:
                validation = trainer.evaluate(state, dataset.validation)
                curve.append(point(done, validation))
        if diverged:
            # The step reused the buffers of the state, so there is none to evaluate;
            # a network that answers NaN picks the first class.
            chance = lambda split: float(np.mean(split.labels == 0))
            loss = {"loss": math.inf}
            validation = loss | {"accuracy": chance(dataset.validation)}
            tested = loss | {"accuracy": chance(dataset.test)}
        else:
            validation = trainer.evaluate(state, dataset.validation)
            tested = trainer.evaluate(state, dataset.test) if test else None
        curve.append(point(self.num_steps, validation))
        curvature = None
        if sharpness and not diverged:
            params = trainer.params(state)
            curvature = self.probe.top_hessian_eigenvalue(params, state.rest)
        return Outcome(
            seed,
            learning_rate,
            validation,
            tested if test else None,
            curve,
            seconds,
            diverged,
            curvature,
        )


def best_learning_rate(outcomes: Sequence[Outcome]) -> float:
    """The learning rate of highest mean validation accuracy; then of lowest loss.

    Rates with a run that diverged come last.
    """

    def merit(rate: float) -> tuple[bool, float, float]:
        runs = [outcome for outcome in outcomes if outcome.learning_rate == rate]
        accuracy = np.mean([run.validation["accuracy"] for run in runs])
        loss = np.mean([run.validation["loss"] for run in runs])
        return not any(run.diverged for run in runs), float(accuracy), -float(loss)

    return max({outcome.learning_rate for outcome in outcomes}, key=merit)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error where there are two values or more.

    Example:
      >>> mean_and_error([1.0, 3.0])
      (2.0, 1.0)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values)))


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The p-value of the two-sided paired t-test.

    Returns:
      The p-value, or None for fewer than two pairs or a constant difference.

    Example:
      >>> paired_p_value([0.1, 0.2, 0.3], [0.3, 0.3, 0.6]) < 0.1
      True
      >>> paired_p_value([0.1, 0.2], [0.1, 0.2]) is None
      True
    """
    differences = np.subtract(first, second)
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return None
    return float(scipy.stats.ttest_rel(first, second).pvalue)


def make_rows(
    contenders: Sequence[Contender],
    finals: dict[str, list[Outcome]],
    grids: dict[str, Sequence[float]],
) -> list[Row]:
    """The table, in the order of the contenders.

    Args:
      contenders: The optimizers; the first is the one to compare with.
      finals: For each name its runs, in one order of seeds for all.
      grids: For each name the learning rates that were tried, if any.

    Returns:
      A row each.
    """
    accuracies = {
        name: [outcome.test["accuracy"] for outcome in outcomes]
        for name, outcomes in finals.items()
    }
    first = accuracies[contenders[0].name]
    rows = []
    for contender in contenders:
        mine, outcomes = accuracies[contender.name], finals[contender.name]
        grid, rate = grids.get(contender.name, ()), outcomes[0].learning_rate
        mean, error = mean_and_error(mine)
        difference, difference_error = mean_and_error(np.subtract(mine, first))
        is_first = contender is contenders[0]
        curvatures = [o.sharpness for o in outcomes if o.sharpness is not None]
        sharpness, sharpness_error = (
            mean_and_error(curvatures) if curvatures else (None, None)
        )
        rows.append(
            Row(
                name=contender.name,
                learning_rate=rate,
                at_edge=len(grid) > 1 and rate in (min(grid), max(grid)),
                mean=mean,
                error=error,
                difference=None if is_first else difference,
                difference_error=None if is_first else difference_error,
                p_value=None if is_first else paired_p_value(mine, first),
                seconds=float(np.mean([outcome.seconds for outcome in outcomes])),
                steps=contender.num_steps,
                diverged=sum(outcome.diverged is not None for outcome in outcomes),
                sharpness=sharpness,
                sharpness_error=sharpness_error,
            )
        )
    return rows


def to_json(outcomes: dict[str, list[Outcome]]) -> dict[str, list[dict[str, Any]]]:
    """Outcomes as JSON holds them."""
    return {name: [run._asdict() for run in runs] for name, runs in outcomes.items()}
