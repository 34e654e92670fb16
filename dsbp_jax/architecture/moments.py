"""Means and covariances of the activations of a group, and what selection asks of them.

They are summed up in double precision on the host. Where a group is wider than
`MAX_DENSE`, rows are kept in place of a matrix.
"""

import math
from collections.abc import Sequence

import numpy as np

MAX_DENSE = 2048  # widest group whose covariance is formed
_PIVOT = 1e-8  # least share of a variance that the others do not say, to solve by it
_SINGLE = 512  # wider moments are formed in single precision, unless all must stay


class Moments:
    """Mean and covariance of the activations of one group at one layer, per entry.

    Attributes:
      count: Rows that were seen.
      mean: Their mean, shape `(entries, n)`.
      second: Their second moment, shape `(entries, n, n)`, or None where rows are kept.
      rows: The rows, shape `(entries, m, n)`, or None.
    """

    def __init__(self, entries: int, size: int, *, exact: bool = True):
        self.count = 0
        self._dtype = np.float64 if exact else np.float32
        self._sum = np.zeros((entries, size))
        dense = size <= MAX_DENSE
        self._second = np.zeros((entries, size, size)) if dense else None
        self._rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Adds rows of shape `(entries, m, n)`."""
        self.count += rows.shape[1]
        self._sum += rows.sum(axis=1, dtype=np.float64)
        if self._second is None:
            kept = max(1, MAX_DENSE // 4)
            self._rows.append(rows[:, :: -(-rows.shape[1] // kept)])
            return
        wide = rows.astype(self._dtype)
        self._second += np.matmul(np.swapaxes(wide, 1, 2), wide)

    @property
    def mean(self) -> np.ndarray:
        """Shape `(entries, n)`."""
        return self._sum / max(self.count, 1)

    def factor(self, centred: bool) -> "Factor":
        """The covariance, or the second moment, as what selection works on."""
        if self._second is None:
            rows = np.concatenate(self._rows, axis=1).astype(np.float64)
            if centred:
                rows = rows - rows.mean(axis=1, keepdims=True)
            return Factor(None, rows / math.sqrt(rows.shape[1]))
        second = self._second / max(self.count, 1)
        if centred:
            second = second - self.mean[:, :, None] * self.mean[:, None, :]
        return Factor(second, None)


def is_exact(size: int, energy: float | None) -> bool:
    """Whether moments of that width are formed in double precision, which costs."""
    return size <= _SINGLE or energy == 1


class Factor:
    """A stack of covariances: dense, or as scaled rows whose Gram matrices they are."""

    def __init__(self, dense: np.ndarray | None, rows: np.ndarray | None):
        self._dense = dense
        self._rows = rows

    @classmethod
    def mean(cls, factors: Sequence["Factor"]) -> "Factor":
        """The mean of several covariances."""
        dense = [one._dense for one in factors if one._dense is not None]
        rows = [one._rows for one in factors if one._rows is not None]
        if dense:
            return cls(sum(dense[1:], start=dense[0]) / len(dense), None)
        return cls(None, np.concatenate(rows, axis=1) / math.sqrt(len(rows)))

    def diagonal(self, entry: int) -> np.ndarray:
        """The variances."""
        if self._dense is not None:
            return np.diagonal(self._dense[entry]).copy()
        assert self._rows is not None
        return np.sum(self._rows[entry] ** 2, axis=0)

    def dense(self, entry: int) -> np.ndarray | None:
        """The covariance, or None where rows stand for it."""
        return None if self._dense is None else self._dense[entry]

    def column(self, entry: int, index: int) -> np.ndarray:
        """The covariances with one neuron."""
        if self._dense is not None:
            return self._dense[entry, :, index]
        assert self._rows is not None
        return self._rows[entry].T @ self._rows[entry][:, index]

    def times(self, entry: int, matrix: np.ndarray) -> np.ndarray:
        """The covariance times a matrix of shape `(n, m)`."""
        if self._dense is not None:
            return self._dense[entry] @ matrix
        assert self._rows is not None
        return self._rows[entry].T @ (self._rows[entry] @ matrix)

    def eigenvalues(self, entry: int, *, exact: bool = True) -> np.ndarray:
        """Descending, not negative; in single precision unless they must be exact."""
        if self._dense is not None:
            dense = self._dense[entry]
            found = np.linalg.eigvalsh(
                dense if exact else dense.astype(np.float32)
            ).astype(np.float64)[::-1]
        else:
            assert self._rows is not None
            found = np.linalg.svd(self._rows[entry], compute_uv=False) ** 2
        return np.maximum(found, 0)

    def eigen(self, entry: int) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvectors as columns, and eigenvalues, descending and not negative."""
        if self._dense is not None:
            values, vectors = np.linalg.eigh(self._dense[entry])
            return vectors[:, ::-1], np.maximum(values[::-1], 0)
        assert self._rows is not None
        _, strengths, vectors = np.linalg.svd(self._rows[entry], full_matrices=False)
        return vectors.T, strengths**2

    def repair(self, entry: int, kept: np.ndarray) -> np.ndarray:
        """M of shape `(kept, n)` with `h ≈ h_S M` in least squares."""
        if self._dense is None:
            assert self._rows is not None
            rows = self._rows[entry]
            found = np.linalg.lstsq(rows[:, kept], rows, rcond=None)[0]
        else:
            dense = self._dense[entry]
            block = dense[np.ix_(kept, kept)]
            squares = np.diagonal(block)
            alive = squares > 1e-30 * np.max(squares, initial=1e-300)
            scale = np.where(alive, 1 / np.sqrt(np.where(alive, squares, 1)), 0)
            scaled = scale[:, None] * block * scale + np.diag(np.where(alive, 0.0, 1.0))
            right = scale[:, None] * dense[kept]
            found = scale[:, None] * _least_squares(scaled, right)
        found[:, kept] = np.eye(len(kept))
        return found


def _least_squares(square: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solves for a covariance of unit diagonal.

    Where the pivots of its Cholesky factor say that it is well conditioned, by
    elimination, else by a decomposition into singular values, which takes far longer.
    """
    try:
        pivots = np.diagonal(np.linalg.cholesky(square)) ** 2
    except np.linalg.LinAlgError:
        pivots = np.zeros(1)
    if np.min(pivots, initial=1) > _PIVOT:
        return np.linalg.solve(square, right)
    return np.linalg.lstsq(square, right, rcond=1e-12)[0]
