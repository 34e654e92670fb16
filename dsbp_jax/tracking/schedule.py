"""The staggered schedule of refreshes: leaves take turns, no step pays for all."""

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def take_turns(costs: Mapping[K, int], period: int) -> dict[K, int]:
    """The step of the period at which each leaf is due, balanced by cost.

    The dearest leaf first, each goes to the turn with the least to do so far; turns are
    as far from each other as the period allows.

    Args:
      costs: What the refresh of each leaf costs, in any unit.
      period: Steps between two refreshes of a leaf.

    Returns:
      A number in `range(period)` for each leaf.

    References:
      Graham, Bounds on multiprocessing timing anomalies, 1969, for the order.

    Example:
      >>> take_turns({"a": 9, "b": 1, "c": 1, "d": 1}, period=2)
      {'a': 0, 'b': 1, 'c': 1, 'd': 1}
      >>> take_turns({"a": 9, "b": 1}, period=10)
      {'a': 0, 'b': 5}
    """
    turns = max(1, min(period, len(costs)))
    load = [0] * turns
    result = {}
    for key in sorted(costs, key=lambda key: -costs[key]):
        turn = min(range(turns), key=lambda turn: load[turn])
        load[turn] += costs[key]
        result[key] = turn * (period // turns)
    return result
