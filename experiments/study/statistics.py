"""Intervals and tests of paired runs, by `scipy.stats`.

Runs are paired by seed: two contenders begin at the same weights and see the same
examples. An interval is one of Student's t: with 3 seeds 4.3 standard errors, with 5
2.8. Where seeds are tested on folds of one set, their training sets overlap, and so do
their errors: the variance of a mean is then `s²(1/n + overlap)`, with the ratio of test
to training examples for the overlap (Nadeau and Bengio, Inference for the
Generalization Error, 2003).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the interval that holds it in 95 of 100 cases.

    Attributes:
      mean: The mean.
      low: The lower end; None for a single value.
      high: The upper end; likewise.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half its width."""
        return None if self.low is None else (self.high - self.low) / 2


def interval(values: Sequence[float], overlap: float = 0.0) -> Interval:
    """The mean of values.

    Args:
      values: By seed.
      overlap: Test over training examples, where seeds share these; otherwise 0.

    Example:
      >>> interval([1.0, 2.0, 3.0]).half
      2.48...
      >>> interval([1.0, 2.0, 3.0], overlap=0.25).half
      3.28...
      >>> interval([1.0])
      Interval(mean=1.0, low=None, high=None)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None, None)
    error = _error(values, overlap)
    if not error > 0:  # also of infinite values
        return Interval(mean, mean, mean)
    ends = scipy.stats.t.interval(LEVEL, len(values) - 1, mean, error)
    return Interval(mean, *map(float, ends))


def _error(values: Sequence[float], overlap: float) -> float:
    """The standard error of a mean."""
    return float(scipy.stats.sem(values)) * math.sqrt(1 + overlap * len(values))


def p_value(
    first: Sequence[float], second: Sequence[float], overlap: float = 0.0
) -> float | None:
    """That of the two-sided paired t-test.

    Args:
      first: By seed.
      second: Likewise.
      overlap: Test over training examples, where seeds share these; otherwise 0.

    Returns:
      The p-value, or None for fewer than two pairs, a constant difference, or one
      that is not finite.

    Example:
      >>> p_value([0.1, 0.2, 0.3], [0.3, 0.3, 0.6]) < 0.1
      True
      >>> p_value([0.1, 0.2], [0.1, 0.2]) is None
      True
    """
    difference = np.subtract(first, second)
    finite = bool(np.isfinite(difference).all())
    if len(difference) < 2 or not finite or np.ptp(difference) < 1e-12:
        return None
    statistic = float(np.mean(difference)) / _error(difference, overlap)
    return float(2 * scipy.stats.t.sf(abs(statistic), len(difference) - 1))


def signed_rank_p_value(differences: Sequence[float]) -> float | None:
    """That of Wilcoxon's two-sided signed-rank test.

    It asks for the order of the differences only, so that they may be of quantities of
    unlike size, such as losses of several problems.

    Args:
      differences: One for each pair; those that are 0 say nothing.

    Returns:
      The p-value, or None where no two pairs differ.

    Example:
      >>> signed_rank_p_value([0.1, 0.2, 0.3, 0.4, 0.5])
      0.0625
      >>> signed_rank_p_value([0.0, 0.1]) is None
      True
    """
    some = [value for value in differences if value]
    if len(some) < 2:
        return None
    return float(scipy.stats.wilcoxon(some).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values of a table, adjusted for their number (Holm, 1979).

    Args:
      p_values: Of the rows; None where nothing was tested.

    Returns:
      Adjusted values in the same places.

    Example:
      >>> holm([0.01, None, 0.04])
      [0.02, None, 0.04]
    """
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    most = 0.0
    for rank, (p, at) in enumerate(tested):
        most = max(most, min(1.0, (len(tested) - rank) * p))
        adjusted[at] = most
    return adjusted


def upper_bound(difference: Sequence[float], overlap: float = 0.0) -> float | None:
    """Below which the mean of differences lies in 95 of 100 cases.

    "As good as" is said of a margin: the other is worse by no more than this.

    Args:
      difference: By seed.
      overlap: Test over training examples, where seeds share these; otherwise 0.

    Example:
      >>> upper_bound([0.0, 0.1, 0.2])
      0.268...
    """
    if len(difference) < 2:
        return None
    mean, error = float(np.mean(difference)), _error(difference, overlap)
    if not error > 0:
        return mean
    return float(scipy.stats.t.ppf(LEVEL, len(difference) - 1, mean, error))


def sampling_error(share: float, examples: int) -> float:
    """Half the interval of a share of right answers, for the choice of the test set.

    Example:
      >>> 100 * sampling_error(0.97, 10_000)
      0.334...
    """
    width = float(scipy.stats.norm.ppf((1 + LEVEL) / 2))
    return width * math.sqrt(share * (1 - share) / examples)
