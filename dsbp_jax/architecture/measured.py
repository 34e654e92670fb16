"""One group as it was measured: what a width would lose, and how it is cut to it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsbp_jax.architecture import pairs, selection
from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.collecting import Seen, rows_of
from dsbp_jax.architecture.cuts import Cut, bias_of
from dsbp_jax.architecture.groups import Group, beside_of
from dsbp_jax.architecture.moments import Factor, is_exact
from dsbp_jax.layers import Site, leaves_by_path


class Measured:
    """A group, what was seen of it, and what keeping so many neurons would lose.

    Attributes:
      errors: By neurons kept, the share of its sinks' answers that is lost.
      values: Eigenvalues of its activations.
    """

    least = 1

    def __init__(
        self,
        structure: AxisTrace,
        group: Group,
        params: Any,
        found: Seen,
        energy: float | None,
        roots: Mapping[str, np.ndarray] | None = None,
    ):
        self.group = group
        self.structure = structure
        sites = {site.name: site for site in structure.traced.sites}
        leaves = leaves_by_path(params)
        seen = [found.sinks[group.name, sink] for sink in group.sinks]
        self.centred = [
            sink in group.repaired
            and not sites[sink].conditional  # rows of a branch not taken are zero
            and bias_of(structure, sites[sink]) is not None
            for sink in group.sinks
        ]
        if group.rotated:  # one set of directions for all
            self.centred = [all(self.centred)] * len(seen)
        self.means = [one.mean for one in seen]
        self.factors = [
            one.factor(centred) for one, centred in zip(seen, self.centred, strict=True)
        ]
        self.entries = math.prod(group.entries)
        metric = dict(roots or {})
        if not all(sink in metric for sink in group.sinks):
            metric = {}  # its layers would not be comparable
        kernels = [
            _kernels(
                structure,
                sites[sink],
                group,
                np.asarray(leaves[sites[sink].path]),
                metric.get(sink),
            )
            for sink in group.sinks
        ]
        one = Factor.mean(self.factors) if group.rotated else None
        self.exact = is_exact(group.size, energy)
        self.orders: list[selection.Order] = []
        self.bases: list[np.ndarray] = []
        totals = []
        for entry in range(self.entries):
            own = [
                selection.answers(kernel[entry], seed)
                for seed, kernel in enumerate(kernels)
            ]
            if group.pairs:
                order, total = pairs.order(found.pairs[group.name], entry)
            elif len(group.repaired) < len(group.sinks):
                order, total = _unrepaired(self.factors, kernels, entry)
            elif one is not None:
                whole = [kernel[entry] for kernel in kernels]
                order, total, basis = selection.rotated(one, whole, entry)
                self.bases.append(basis)
            else:
                order, total = selection.order(
                    self.factors, own, entry, exact=self.exact
                )
            self.orders.append(order)
            totals.append(total)
        longest = max(len(order.errors) for order in self.orders)
        weights = np.array(totals) / max(sum(totals), 1e-300)
        padded = [
            np.pad(order.errors, (0, longest - len(order.errors)), mode="edge")
            for order in self.orders
        ]
        self.errors = np.tensordot(weights, np.array(padded), axes=1)
        self.values = (
            pairs.spectrum(found.pairs[group.name][0], 0)
            if group.pairs
            else self.factors[0].eigenvalues(0, exact=self.exact)
        )

    def rank(self, share: float) -> int:
        """The fewest eigenvalues of the activations that hold a share of their sum."""
        return selection.spectral_width(self.values, share)

    def cut(self, width: int) -> Cut:
        """The matrices of a cut to that width."""
        size, structure = self.group.size, self.structure
        encode = np.zeros((self.entries, size, width))
        decode = {
            sink: np.zeros((self.entries, size, width)) for sink in self.group.sinks
        }
        shifts = {
            sink: np.zeros((self.entries, size))
            for sink, centred in zip(self.group.sinks, self.centred, strict=True)
            if centred
        }
        for entry, order in enumerate(self.orders):
            kept = order.neurons[:width]
            if self.group.rotated:
                vectors = self.bases[entry][:, :width]
                encode[entry, :, : vectors.shape[1]] = vectors
            else:
                rest = np.setdiff1d(np.arange(size), order.neurons)
                kept = np.sort(np.concatenate([kept, rest])[:width].astype(int))
                encode[entry, kept, np.arange(len(kept))] = 1
            for index, sink in enumerate(self.group.sinks):
                factor, mean = self.factors[index], self.means[index][entry]
                if self.group.rotated:
                    repair = _projected(factor, entry, encode[entry])
                elif sink in self.group.repaired:
                    repair = factor.repair(entry, kept)
                else:
                    repair = encode[entry].T
                decode[sink][entry] = repair.T
                if sink in shifts:
                    shifts[sink][entry] = mean - mean @ encode[entry] @ repair
        beside = [structure.axes.size(a) for a in beside_of(structure, self.group)]
        shaped = lambda array: array.reshape(*beside, *array.shape[1:])
        return Cut(
            self.group,
            width,
            shaped(encode),
            {
                sink: shaped(matrix)
                for sink, matrix in decode.items()
                if sink in self.group.repaired
            },
            {sink: shaped(shift) for sink, shift in shifts.items()},
        )


def _unrepaired(
    factors: Sequence[Factor], kernels: Sequence[np.ndarray], entry: int
) -> tuple[selection.Order, float]:
    """The order of neurons where a kernel keeps the rows that it has.

    Without those of D the answers lose `h_D W_D`, of mean square
    `Σ_{d,d'∈D} C[d,d'] (WWᵀ)[d,d']`: as pairs do.
    """
    both = [
        factor.times(entry, np.eye(len(kernel[entry])))
        * (kernel[entry] @ kernel[entry].T)
        for factor, kernel in zip(factors, kernels, strict=True)
    ]
    return pairs.by_loss(sum(both[1:], start=both[0]))


def _projected(factor: Factor, entry: int, vectors: np.ndarray) -> np.ndarray:
    """M with `h ≈ hVM` in least squares; of one covariance's eigenvectors it is Vᵀ."""
    image = factor.times(entry, vectors)
    small = vectors.T @ image
    return np.linalg.lstsq(small, image.T, rcond=1e-12)[0]


def _kernels(
    structure: AxisTrace,
    site: Site,
    group: Group,
    leaf: np.ndarray,
    root: np.ndarray | None,
) -> np.ndarray:
    """A sink's kernel as `(entries, n, everything else)`.

    Answers are weighed by what the outputs feel of them, `WR`; directions of a rotated
    group, of which there may be more than R has columns, by the mean of it.
    """
    matrix = np.transpose(leaf.astype(np.float64), site.view.permutation(leaf.ndim))
    matrix = matrix.reshape(site.view.matrix_shape(leaf.shape))
    if root is not None:
        if group.rotated:
            squares = np.sum(root**2, axis=(-2, -1)) / root.shape[-2]
            matrix = matrix * np.sqrt(squares)[..., None, None, None]
        else:
            matrix = matrix @ root[..., None, :, :]
    columns = np.moveaxis(matrix, -2, -1)  # of d_in each, as rows of activations
    columns = columns.reshape(*matrix.shape[:-3], -1, matrix.shape[-2])
    found = list(rows_of(structure, site, group, columns))
    return np.swapaxes(np.concatenate(found, axis=1), 1, 2)
