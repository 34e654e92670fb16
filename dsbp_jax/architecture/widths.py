"""Sharing out a budget: widths whose predicted losses add up to the least."""

from collections.abc import Callable, Sequence

import numpy as np

_ROUNDS = 3  # linearisations of the cost
_HALVINGS = 60


class Curve:
    """What a group loses at the widths that it may have.

    Args:
      errors: By width, the share of its answers' variance that is lost.
      size: Its width.
      multiple_of: Of which widths are multiples.
      least: The smallest width.

    Attributes:
      widths: Those that it may have.
      losses: What each of them loses: the errors, unless something better is known.
    """

    def __init__(self, errors: np.ndarray, size: int, multiple_of: int, least: int = 1):
        self.size = size
        self._errors = errors
        self._step = multiple_of
        self._least = least
        steps = range(self.rounded(least), size, multiple_of)
        self.widths = np.array([*steps, size], int)
        self.losses = np.array([self.error(width) for width in self.widths])

    def error(self, width: int) -> float:
        """The predicted share of the answers' variance that is lost."""
        if width >= self.size:
            return 0.0
        return float(self._errors[min(width, len(self._errors) - 1)])

    def loss(self, width: int) -> float:
        """What a width that it may have loses."""
        return float(self.losses[np.searchsorted(self.widths, width)])

    def rounded(self, width: int) -> int:
        """The next width that is allowed, at least one step."""
        steps = max(1, -(-max(width, self._least) // self._step))
        return min(self.size, steps * self._step)


def share_out(
    curves: Sequence[Curve], cost: Callable[[Sequence[int]], float], target: float
) -> list[int]:
    """Widths of the least predicted loss whose cost is at most `target`.

    The sum of losses is minimised under a price on cost, a Lagrange multiplier that is
    bisected; the price of a neuron is its share of the cost at the widths so far.

    Args:
      curves: One for each group.
      cost: Of widths, relative to the original's.
      target: The cost that is allowed, relative.

    Returns:
      The widths.

    Raises:
      ValueError: Even the smallest widths cost more; the least is named.

    Example:
      >>> flat, steep = np.full(9, 1e-6), np.linspace(1, 0, 9)
      >>> curves = [Curve(flat, 8, 1), Curve(steep, 8, 1)]
      >>> share_out(curves, lambda widths: sum(widths) / 16, 0.6)
      [1, 8]
    """
    whole = [curve.size for curve in curves]
    if cost(whole) <= target:
        return whole
    least = [int(curve.widths[0]) for curve in curves]
    if (lowest := cost(least)) > target:
        raise ValueError(
            f"no plan keeps flops={target:g}: with every width at its least the "
            f"nearest is {lowest:.3g}; ask for more, or let widths be less"
        )
    total = lambda widths: sum(
        float(c.losses[np.searchsorted(c.widths, w)])
        for c, w in zip(curves, widths, strict=True)
    )
    widths = best = least
    for number in range(_ROUNDS):
        # What a neuron costs where the other groups are as wide as they are so far.
        at, prices = whole if number == 0 else widths, []
        for index, curve in enumerate(curves):
            thin, thick = list(at), list(at)
            thin[index], thick[index] = least[index], curve.size
            steps = max(curve.size - least[index], 1)
            prices.append((cost(thick) - cost(thin)) / steps)
        low, high = 1e-15, 1e9
        for _ in range(_HALVINGS):
            price = (low * high) ** 0.5
            found = [
                int(c.widths[np.argmin(c.losses + price * unit * c.widths)])
                for c, unit in zip(curves, prices, strict=True)
            ]
            if cost(found) <= target:
                widths, high = found, price
            else:
                low = price
        if total(widths) < total(best):
            best = widths
    return _filled(curves, cost, target, best)


def _filled(
    curves: Sequence[Curve],
    cost: Callable[[Sequence[int]], float],
    target: float,
    widths: list[int],
) -> list[int]:
    """Spends what is left of the budget, where it lowers the loss the most."""
    while True:
        options = []
        for index, curve in enumerate(curves):
            at = int(np.searchsorted(curve.widths, widths[index]))
            if at + 1 == len(curve.widths):
                continue
            wider = list(widths)
            wider[index] = int(curve.widths[at + 1])
            gain = curve.losses[at] - curve.losses[at + 1]
            if gain > 0 and cost(wider) <= target:
                options.append((gain, wider))
        if not options:
            return widths
        widths = max(options, key=lambda option: option[0])[1]
