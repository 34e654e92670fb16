"""Search for rates: a grid that grows until its best point is inside.

A point is a whole number for each axis, the neighbours away from the default. All
contenders have the same axes, ratios and rules. At a part of the steps and with one
seed the neighbours of the best point so far are tried until none is better: those along
an axis, then, as a rate and its decay may have to move together, those along two at
once. The two best points are run again at full length with three seeds, and the better
one is taken.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Point = tuple[int, ...]

MOST = 6  # neighbours from the default


class Search(NamedTuple):
    """What a search found.

    Attributes:
      best: The best point.
      second: The next best, or None where only one was tried.
      interior: Whether all neighbours of the best point were tried.
      scores: All that was tried; lower is better.
    """

    best: Point
    second: Point | None
    interior: bool
    scores: Mapping[Point, float]


def search(
    score: Callable[[Sequence[Point]], Sequence[float]],
    num_axes: int,
    most: int = MOST,
) -> Search:
    """Minimises over points, from the origin.

    Args:
      score: From points to their scores, infinite for a run that diverged.
      num_axes: How many numbers a point has.
      most: How far from the origin they may go.

    Returns:
      What it found.

    Example:
      >>> found = search(lambda points: [(x - 2) ** 2 for (x,) in points], 1)
      >>> found.best, found.interior, sorted(found.scores)
      ((2,), True, [(-1,), (0,), (1,), (2,), (3,)])
    """
    scores: dict[Point, float] = {}
    # Of points that diverged alike the lower rates are nearer to those that do not.
    key = lambda point: (scores[point], sum(point) if scores[point] == math.inf else 0)

    def untried(points: Sequence[Point]) -> list[Point]:
        return [p for p in points if p not in scores and max(map(abs, p)) <= most]

    best = (0,) * num_axes
    while new := (
        untried([best, *_neighbours(best, 1)]) or untried(_neighbours(best, 2))
    ):
        scores.update(zip(new, score(new), strict=True))
        best = min(scores, key=key)
    others = [point for point in scores if point != best]
    return Search(
        best,
        min(others, key=key, default=None),
        all(point in scores for away in (1, 2) for point in _neighbours(best, away)),
        scores,
    )


def _neighbours(point: Point, away: int) -> list[Point]:
    """The points that differ by one along so many axes."""
    return [
        tuple(at + by for at, by in zip(point, move, strict=True))
        for move in itertools.product((-1, 0, 1), repeat=len(point))
        if sum(map(abs, move)) == away
    ]
