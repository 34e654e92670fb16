"""Widths that are summed over, as by LayerNorm: copies are merged, nothing else goes.

Each entry counts in a mean, dead or not, so none may go whose place nothing takes.
Entries for which all leaves that bring the width agree are equal in every array: one of
them stands for all, with their number as its weight in sums, and the kernels that
contract the width add up what they had for each.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.cuts import Cut
from dsbp_jax.architecture.groups import Group
from dsbp_jax.layers import leaves_by_path


class Merged:
    """A group of which copies can be merged; like `measured.Measured`."""

    exact = True

    def __init__(self, structure: AxisTrace, group: Group, params: Any):
        self.group = group
        sites = {site.name: site for site in structure.traced.sites}
        taken = {
            (sites[sink].path, axis)
            for sink in group.sinks
            for axis in sites[sink].view.input_axes
        }
        leaves = leaves_by_path(params)
        rows = [
            np.moveaxis(np.asarray(leaves[place.path]), place.axis, 0).reshape(
                group.size, -1
            )
            for place in group.places
            if (place.path, place.axis) not in taken
        ]
        kinds: dict[bytes, int] = {}
        self.copies = np.array(
            [kinds.setdefault(key, len(kinds)) for key in _digests(rows, group.size)]
        )
        self.least = len(kinds)
        self.errors = np.zeros(group.size + 1)

    def rank(self, share: float) -> int:
        """How many entries differ."""
        del share
        return self.least

    def cut(self, width: int) -> Cut:
        """The matrices of a cut to that width, at least one for each kind of entry."""
        size = self.group.size
        _, first = np.unique(self.copies, return_index=True)
        spare = np.setdiff1d(np.arange(size), first)
        kept = np.sort(np.concatenate([first, spare[: width - len(first)]]))
        stands = {int(self.copies[index]): at for at, index in enumerate(kept)}
        member = np.zeros((size, width))
        for index in range(size):
            own = np.flatnonzero(kept == index)
            at = int(own[0]) if len(own) else stands[int(self.copies[index])]
            member[index, at] = 1
        encode = np.zeros((size, width))
        encode[kept, np.arange(width)] = 1
        decode = {sink: member for sink in self.group.sinks}
        return Cut(self.group, width, encode, decode, {}, member.sum(axis=0))


def _digests(rows: Sequence[np.ndarray], size: int) -> Iterator[bytes]:
    """Of each entry, of all arrays: bit by bit but for the sign of zero.

    No sum tells that sign; and arrays sorted as a whole take many times their memory.
    """
    for index in range(size):
        digest = hashlib.blake2b()
        for row in rows:
            entry = row[index]
            inexact = jnp.issubdtype(entry.dtype, jnp.inexact)
            digest.update((entry + 0 if inexact else entry).tobytes())
        yield digest.digest()
