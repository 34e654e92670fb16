"""Intervals and tests of paired runs."""

import numpy as np
import pytest
import scipy.stats

from experiments.study import statistics


def test_intervals_are_students():
    values = [97.1, 97.4, 96.9]
    mean, low, high = statistics.interval(values)
    error = np.std(values, ddof=1) / np.sqrt(3)
    assert (high - mean) / error == pytest.approx(4.303, abs=1e-3)
    assert mean - low == pytest.approx(high - mean)
    assert statistics.interval([1.0, 1.0]).half == 0


def test_paired_tests_are_of_differences():
    first, second = [1.0, 2.0, 3.0], [1.1, 2.3, 3.2]
    expected = scipy.stats.ttest_1samp(np.subtract(first, second), 0).pvalue
    assert statistics.p_value(first, second) == pytest.approx(expected)
    assert statistics.p_value([0.5], [0.6]) is None
    assert statistics.p_value([np.inf, 1.0], [1.0, 2.0]) is None
    bound = statistics.upper_bound(np.subtract(second, first))
    low, high = scipy.stats.ttest_1samp(
        np.subtract(second, first), 0
    ).confidence_interval(0.9)
    assert bound == pytest.approx(high)
    assert low < bound


def test_runs_that_share_examples_say_less():
    """Nadeau and Bengio's variance, `s²(1/n + n₂/n₁)`."""
    first, second = [0.5, 0.6, 0.4, 0.7, 0.6], [0.6, 0.7, 0.6, 0.8, 0.6]
    change = np.subtract(first, second)
    t = change.mean() / np.sqrt(change.var(ddof=1) * (1 / 5 + 1 / 4))
    assert statistics.p_value(first, second, 1 / 4) == pytest.approx(
        2 * scipy.stats.t.cdf(t, 4)
    )
    plain, wide = (statistics.interval(change, o).half for o in (0.0, 1 / 4))
    assert wide == pytest.approx(1.5 * plain)
    mean = change.mean()
    excess = [statistics.upper_bound(change, o) - mean for o in (0.0, 1 / 4)]
    assert excess[1] == pytest.approx(1.5 * excess[0])


def test_holm_never_falls_and_never_passes_one():
    assert statistics.holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert statistics.holm([0.9, None, 0.8]) == [1.0, None, 1.0]
