"""A plan: what is to be cut and what it is worth, as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.cuts import Cut
from dsbp_jax.architecture.groups import Group


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """What is to become of one group.

    Attributes:
      group: The group.
      width: The width that it keeps.
      rank: How many eigenvalues of its activations hold the share of energy asked for
        (0.99 where none was).
      error: The share of the variance of its sinks' answers that is lost, predicted;
        for a share of FLOPs or latency answers are weighed by what the outputs feel of
        them, where a derivative reaches all of the sinks.
      loss: What is lost of the outputs where this group alone is cut, as a share of
        their variance: measured at some widths, interpolated between, and of groups
        wider than 2,048 estimated from the others. None where nothing was measured.
    """

    group: Group
    width: int
    rank: int
    error: float
    loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be cut and what it is worth; prints as a table.

    Attributes:
      groups: One for each group that can be cut.
      flops: Operations of all products, over those of the original.
      parameters: Numbers in all leaves, likewise.
      latency: By batch size, seconds of the original and of the smaller model, medians
        as measured here; empty where no batch size was named.
      left: What can be cut by its axes and is left whole, and why.
      cuts: The matrices.
      structure: The traced function.
      sample: The first batch.
    """

    groups: tuple[GroupPlan, ...]
    flops: float
    parameters: float
    latency: Mapping[int, tuple[float, float]]
    left: Mapping[str, str]
    cuts: tuple[Cut, ...] = dataclasses.field(repr=False)
    structure: AxisTrace = dataclasses.field(repr=False, compare=False)
    sample: Any = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        """The table."""
        weighed = any(one.loss is not None for one in self.groups)
        head = ("group", "width", "kept", "rank", "how", "error")
        rows = [(*head, "loss") if weighed else head]
        for one in self.groups:
            group = one.group
            how = group.how
            if group.sinks and not group.repaired:
                how += ", not repaired"
            name = group.name
            if group.beside:
                name += f", each of {'×'.join(map(str, group.entries))}"
            numbers = (str(group.size), str(one.width), str(one.rank))
            loss = () if one.loss is None else (f"{one.loss:.2e}",)
            rows.append((name, *numbers, how, f"{one.error:.2e}", *loss))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"{name} stays: {reason}" for name, reason in self.left.items()]
        lines.append(f"FLOPs {self.flops:.1%}, parameters {self.parameters:.1%}")
        for size, (before, after) in self.latency.items():
            times = f"{before * 1e3:.3g} ms → {after * 1e3:.3g} ms"
            lines.append(f"batch of {size}: {times} ({after / before:.2f})")
        return "\n".join(lines)

    __repr__ = __str__
