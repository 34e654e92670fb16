"""Streams of corrupted images, as a deployed model meets them.

A stream is a plan, which image comes when, under which shift and how severe, made of
the labels alone; the pixels are made as they are asked for.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments import checks
from experiments.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from experiments.data.dataset import Split

SETTINGS = (
    "reset",
    "continual",
    "gradual",
    "mixed",
    "correlated",
    "return",
    "clean",
)
_CHUNK = 2000  # images that are corrupted at once, about


class Plan(NamedTuple):
    """What comes when.

    Attributes:
      index: Which image, shape `(n,)`.
      shift: Its corruption, an index into `names`, shape `(n,)`.
      severity: From 1 to 5, shape `(n,)`.
      names: The corruptions; `"clean"` among them where some images are.
      fresh: Where a method may begin anew, as it is told that the shift is another.
    """

    index: np.ndarray
    shift: np.ndarray
    severity: np.ndarray
    names: tuple[str, ...]
    fresh: frozenset[int]

    def __len__(self) -> int:
        return len(self.index)


class Batch(NamedTuple):
    """A part of a stream.

    Attributes:
      images: uint8 array `(n, height, width, channels)`.
      labels: int32 array `(n,)`.
      shift: As in the plan.
      fresh: Whether a method may begin anew.
    """

    images: np.ndarray
    labels: np.ndarray
    shift: np.ndarray
    fresh: bool


def arrange(
    labels: np.ndarray,
    setting: str,
    *,
    count: int | None = None,
    severity: int = 5,
    shifts: Sequence[str] = tuple(CORRUPTIONS),
    repeats: int = 1,
    seed: int = 0,
) -> Plan:
    """The plan of a stream.

    `reset`: one shift after the other, and the method is told when. `continual`: the
    same, and it is not. `gradual`: of each shift severities 1 to the highest and back.
    `mixed`: shifts at random. `correlated`: as `continual`, each shift sorted by label.
    `return`: as `continual`, after each shift as many clean images. `clean`: no shift.

    Args:
      labels: Of the images.
      setting: One of `SETTINGS`.
      count: Images of each shift; by default all. They are drawn for each shift anew.
      severity: From 1 to 5; of `gradual` the highest.
      shifts: In this order.
      repeats: How often all of it comes.
      seed: Of the order.

    Returns:
      The plan.

    Raises:
      ValueError: If an argument is not accepted.

    Example:
      >>> plan = arrange(np.arange(6) % 2, "correlated", shifts=("fog", "snow"))
      >>> (np.arange(6) % 2)[plan.index].tolist()
      [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    """
    checks.one_of("setting", setting, SETTINGS)
    checks.one_of("severity", severity, SEVERITIES)
    checks.some("shifts", shifts)
    for name in shifts:
        checks.one_of("shifts", name, CORRUPTIONS)
    checks.count("repeats", repeats)
    count = len(labels) if count is None else count
    checks.count("count", count, high=len(labels))
    rng = np.random.default_rng(seed)
    names = ("clean", *shifts)
    parts: list[tuple[np.ndarray, int, np.ndarray]] = []
    for _ in range(repeats):
        for shift in range(1, len(names)):
            index = rng.permutation(len(labels))[:count]
            severities = np.full(count, severity)
            if setting == "correlated":
                index = index[np.argsort(labels[index], kind="stable")]
            if setting == "gradual":
                rise = np.arange(1, severity + 1)
                steps = np.concatenate([rise, rise[-2::-1]])
                severities = steps[np.arange(count) * len(steps) // count]
            parts.append((index, 0 if setting == "clean" else shift, severities))
            if setting == "return":
                parts.append((rng.permutation(len(labels))[:count], 0, severities))
    begins = np.cumsum([0] + [len(index) for index, _, _ in parts[:-1]])
    index, severities = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
    shift = np.concatenate([np.full(len(part[0]), part[1]) for part in parts])
    if setting == "mixed":
        order = rng.permutation(len(index))
        index, shift, severities = index[order], shift[order], severities[order]
    told = frozenset(begins.tolist()) if setting == "reset" else frozenset({0})
    return Plan(index, shift, severities, names, told)


def batches(
    split: Split, plan: Plan, batch_size: int, *, seed: int = 0
) -> Iterator[Batch]:
    """The batches of a stream; where a shift begins anew, so does a batch.

    Args:
      split: The images that it was planned for.
      plan: The plan.
      batch_size: Images at a time; a last part that is smaller is left out.
      seed: Of what is random in the corruptions.

    Yields:
      The batches.
    """
    checks.count("batch_size", batch_size)
    ends = sorted({*plan.fresh, len(plan)} - {0})
    begin = 0
    for end in ends:
        whole = begin + (end - begin) // batch_size * batch_size
        step = max(1, _CHUNK // batch_size) * batch_size
        for first in range(begin, whole, step):
            part = slice(first, min(first + step, whole))
            images = _made(split.images, plan, part, seed)
            labels = split.labels[plan.index[part]]
            for at in range(0, len(images), batch_size):
                own = slice(at, at + batch_size)
                yield Batch(
                    images[own],
                    labels[own],
                    plan.shift[part][own],
                    at == 0 and first == begin,
                )
        begin = end


def _made(images: np.ndarray, plan: Plan, part: slice, seed: int) -> np.ndarray:
    """The images of a part of a plan."""
    index, shift, severity = (column[part] for column in plan[:3])
    result = np.empty((len(index), *images.shape[1:]), np.uint8)
    for kind, strength in sorted(
        set(zip(shift.tolist(), severity.tolist(), strict=True))
    ):
        own = (shift == kind) & (severity == strength)
        drawn = seed + part.start  # other draws in each part
        name = plan.names[kind]
        result[own] = corrupt(images[index[own]], name, strength, seed=drawn)
    return result
