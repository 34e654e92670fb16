"""How a width is cut: which neurons stay, and what the next layer makes of them.

The next layer answers `hW` to activations h. With neurons S kept and the others
predicted from them, `h ≈ h_S M + c`, it answers `h_S(MW) + cW`: MW is its repaired
kernel and cW goes into its bias. What is lost is `tr WᵀRW`, R the covariance of what
h_S does not say of h. Neurons are taken greedily, each time the one that lowers this
sum the most: a Cholesky factorisation of the covariance, pivoted by what the next
layers do with it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsbp_jax.architecture.moments import Factor

_SKETCH = 64  # random answers that stand for those of a wider layer
# Below this share of its own variance (or of the largest) nothing is left of a neuron
# that the others do not say: rounding of activations in single precision.
_NOTHING = 1e-11
_NOTHING_SINGLE = 1e-6
_BLOCK = 128  # neurons that are taken out of a covariance at once


class Order(NamedTuple):
    """Neurons by how much they add.

    Attributes:
      neurons: Their indices, the most useful first.
      errors: With so many kept the share of the answers' variance that is lost; one
        longer than `neurons`, from 1 down.
    """

    neurons: np.ndarray
    errors: np.ndarray


def answers(kernel: np.ndarray, seed: int) -> np.ndarray:
    """The kernel, or as many random mixtures of its columns as stand for them.

    Args:
      kernel: Shape `(n, d_out)`.
      seed: Of the signs.

    Returns:
      Shape `(n, at most 64)`, with `ΩΩᵀ` in the mean `kernel·kernelᵀ`.
    """
    if kernel.shape[1] <= _SKETCH:
        return kernel
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(kernel.shape[1], _SKETCH))
    return kernel @ signs / np.sqrt(_SKETCH)


def order(
    factors: Sequence[Factor],
    kernels: Sequence[np.ndarray],
    entry: int,
    *,
    exact: bool,
) -> tuple[Order, float]:
    """Orders the neurons of a group by what they add to the answers of its sinks.

    Args:
      factors: The covariance at each sink.
      kernels: What each sink does with it, shape `(n, m)`.
      entry: Which of the stack.
      exact: Whether the covariances are in double precision.

    Returns:
      The order, and the variance of the answers. Neurons of which nothing is left, dead
      ones and those that others say, are left out.
    """
    size = len(kernels[0])
    dtype: Any = np.float64 if exact else np.float32
    kernels = [kernel.astype(dtype) for kernel in kernels]
    residuals = [Residual(factor, entry, dtype) for factor in factors]
    images = [
        factor.times(entry, kernel).astype(dtype)
        for factor, kernel in zip(factors, kernels, strict=True)
    ]
    total = sum(
        float(np.sum(kernel * image, dtype=np.float64))
        for kernel, image in zip(kernels, images, strict=True)
    )
    nothing = _NOTHING if exact else _NOTHING_SINGLE
    floors = [
        nothing * np.maximum(one.variances, 1e-3 * np.max(one.variances, initial=0))
        + 1e-300
        for one in residuals
    ]
    left = np.ones(size, bool)
    chosen: list[int] = []
    lost = [total]
    while True:
        gain = np.zeros(size)
        alive = np.zeros(size, bool)
        for one, image, floor in zip(residuals, images, floors, strict=True):
            ok = one.variances > floor
            squares = np.einsum("ij,ij->i", image, image)
            gain += np.where(ok, squares / np.where(ok, one.variances, 1), 0)
            alive |= ok
        alive &= left
        if not alive.any():
            break
        pick = int(np.argmax(np.where(alive, gain, -1)))
        left[pick] = False
        drop = 0.0
        for one, image, kernel, floor in zip(
            residuals, images, kernels, floors, strict=True
        ):
            if one.variances[pick] > floor[pick]:
                column = one.take_out(pick)
                answer = column @ kernel
                image -= column[:, None] * answer
                drop += float(answer @ answer)
        chosen.append(pick)
        lost.append(max(lost[-1] - drop, 0.0))
    errors = np.array(lost) / total if total > 0 else np.zeros(len(lost))
    return Order(np.array(chosen, int), errors), total


class Residual:
    """What the neurons taken so far do not say of a covariance: its Schur complement.

    A pivoted Cholesky factorisation, in blocks: of a dense covariance the neurons of a
    whole block are taken out by one product.

    Attributes:
      variances: What is left of each.  # shape=(n,)
    """

    def __init__(self, factor: Factor, entry: int, dtype: Any):
        self.variances = factor.diagonal(entry)
        self._factor, self._entry = factor, entry
        dense = factor.dense(entry)
        self._dense: Any = None if dense is None else np.array(dense, dtype)
        size = len(self.variances)
        held = size if self._dense is None else _BLOCK
        self._rows: np.ndarray = np.empty((held, size), dtype)
        self._held = 0

    def take_out(self, pick: int) -> np.ndarray:
        """Takes a neuron as known: its column of the Cholesky factor, shape `(n,)`."""
        if self._dense is None:
            column = self._factor.column(self._entry, pick)
        else:
            column = self._dense[pick]
        done = self._rows[: self._held]
        column = (column - done[:, pick] @ done) / np.sqrt(self.variances[pick])
        column = column.astype(self._rows.dtype)
        self._rows[self._held] = column
        self._held += 1
        if self._dense is not None and self._held == _BLOCK:
            self._dense -= self._rows.T @ self._rows
            self._held = 0
        self.variances = np.maximum(self.variances - column**2, 0)
        return column


def rotated(
    factor: Factor, kernels: Sequence[np.ndarray], entry: int
) -> tuple[Order, float, np.ndarray]:
    """The directions of a group that its sinks answer to, where linear maps are all.

    With `h = gR`, g of unit covariance, the answers are `g·RW`. Of the best `h_k`, of k
    dimensions, the answers are those of the leading k left singular vectors of RW.

    Args:
      factor: The covariance C; only linear maps stand between source and sinks, so one
        does for all.
      kernels: What each sink does with it, shape `(n, m)`.
      entry: Which of the stack.

    Returns:
      The order, the variance of the answers, and the directions as columns of unit
      norm: shape `(n, rank)`, in order.
    """
    basis, values = factor.eigen(entry)
    kept = values > _NOTHING * max(values[0], 1e-300)
    basis, scale = basis[:, kept], np.sqrt(values[kept])
    whole = np.concatenate(kernels, axis=1)
    left, strengths, _ = np.linalg.svd(
        scale[:, None] * (basis.T @ whole), full_matrices=False
    )
    gains = strengths**2
    total = float(gains.sum())
    rank = int(np.sum(gains > _NOTHING * total)) if total > 0 else 0
    vectors = basis @ (left[:, :rank] / scale[:, None])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=0), 1e-300)
    lost = total - np.concatenate([[0.0], np.cumsum(gains[:rank])])
    errors = np.maximum(lost, 0) / total if total > 0 else np.zeros(1)
    errors[rank] = 0.0
    return Order(np.arange(rank), errors), total, vectors


def width_of_energy(errors: np.ndarray, energy: float, exact: bool) -> int:
    """The fewest neurons with which at most `1 − energy` is lost."""
    slack = 0.0 if energy == 1 else 1 - energy
    enough = np.flatnonzero(errors <= slack + (1e-15 if exact else 1e-9))
    return int(enough[0]) if len(enough) else len(errors) - 1


def spectral_width(values: np.ndarray, energy: float) -> int:
    """The fewest eigenvalues that hold a share of their sum."""
    total = values.sum()
    if total <= 0:
        return 0
    held = np.cumsum(values) / total
    return int(np.searchsorted(held, energy * (1 - 1e-12)) + 1)
