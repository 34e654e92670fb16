"""Searches for rates end inside of what they tried."""

import numpy as np
import pytest

from experiments.study.tuning import search


@pytest.mark.parametrize("best", [(0, 0), (2, -1), (-3, 4), (5, 5)])
def test_a_search_ends_inside(best):
    tried = []

    def score(points):
        tried.extend(points)
        return [sum((a - b) ** 2 for a, b in zip(p, best, strict=True)) for p in points]

    found = search(score, 2)
    assert (found.best, found.interior) == (best, True)
    assert len(tried) == len(set(tried))
    assert found.second != best


def test_a_search_follows_a_valley_that_no_axis_runs_along():
    # A rate and its decay: only both moved at once get further.
    valley = lambda x, y: 10 * (x + y) ** 2 + (x - y - 6) ** 2
    found = search(lambda points: [valley(*point) for point in points], 2)
    assert (found.best, found.interior) == ((3, -3), True)


def test_a_search_tries_two_axes_at_once_only_where_one_gets_no_further():
    found = search(lambda points: [x**2 + y**2 for x, y in points], 2)
    assert set(list(found.scores)[:5]) == {(0, 0), (-1, 0), (0, -1), (0, 1), (1, 0)}
    assert sorted(list(found.scores)[5:]) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]


def test_a_search_flees_what_diverges():
    found = search(lambda ps: [np.inf if x > -3 else abs(x + 4) for (x,) in ps], 1)
    assert (found.best, found.interior) == ((-4,), True)


def test_a_search_says_where_it_was_stopped():
    found = search(lambda points: [-x for (x,) in points], 1, most=2)
    assert (found.best, found.interior) == ((2,), False)
