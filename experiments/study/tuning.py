"""Search for rates: a grid that grows until its best point is inside.

A point is a whole number for each axis, the neighbours away from the default. All
contenders have the same axes, ratios and rules. At a third of the steps and with one
seed the neighbours of the best point so far are tried until none is better; the two
best points are run again at full length with three seeds, and the better one is taken.
"""

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
    origin = (0,) * num_axes
    best = origin
    while True:
        around = [best, *_neighbours(best)]
        new = [p for p in around if p not in scores and max(map(abs, p)) <= most]
        if not new:
            break
        scores.update(zip(new, score(new), strict=True))
        best = min(scores, key=key)
    others = [point for point in scores if point != best]
    return Search(
        best,
        min(others, key=key, default=None),
        all(point in scores for point in _neighbours(best)),
        scores,
    )


def _neighbours(point: Point) -> list[Point]:
    return [
        (*point[:axis], point[axis] + by, *point[axis + 1 :])
        for axis in range(len(point))
        for by in (-1, 1)
    ]
