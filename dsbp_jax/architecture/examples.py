"""Some examples of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def count(batch: Any) -> int:
    """How many examples a batch has: the longest leading axis of its arrays."""
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
    return max(sizes, default=1)


def taken(batch: Any, index: Any) -> Any:
    """The examples of an index or a slice; what all of them share stays."""
    whole = count(batch)
    along = lambda leaf: np.ndim(leaf) and np.shape(leaf)[0] == whole
    return jax.tree.map(lambda leaf: leaf[index] if along(leaf) else leaf, batch)


def some(batch: Any, start: int, number: int) -> Any:
    """So many examples from one on; what all of them share stays."""
    return taken(batch, slice(start, start + number))


def at_once(trace_of: Callable[[Any], Any], batch: Any, most: int) -> int:
    """So many examples as a function takes; all where it takes no other number."""
    whole = count(batch)
    if whole <= most:
        return whole
    try:
        trace_of(some(batch, 0, most))
    except Exception:  # whatever a reshape to the size of the batch raises
        return whole
    return most
