"""Matrices of prescribed spectrum, and what is attainable on them in float32."""

import numpy as np

DIM = 256
RANK = 16

SPECTRA = {
    "flat": np.ones(DIM),
    "decaying": 1.0 / np.arange(1, DIM + 1),
    "geometric": 0.9 ** np.arange(DIM),
    "step": np.where(np.arange(DIM) < RANK, 10.0, 1.0),
    "repeated": np.repeat(np.arange(DIM // 8, 0, -1.0), 8),
    "rank_deficient": np.where(np.arange(DIM) < RANK // 2, 1.0, 0.0),
    "condition_1e6": np.logspace(0, -6, DIM),
    "zero": np.zeros(DIM),
}


def symmetric(spectrum: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with that spectrum and its eigenvectors, both float64."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((spectrum.size, spectrum.size)))
    return q * spectrum @ q.T, q


def factor(spectrum: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows x with `xᵀx/n` of that spectrum, float64, n = d."""
    rng = np.random.default_rng(seed + 1)
    _, q = symmetric(spectrum, seed)
    left, _ = np.linalg.qr(rng.standard_normal((spectrum.size, spectrum.size)))
    return left * np.sqrt(spectrum * spectrum.size) @ q.T


def projector_tolerance(spectrum: np.ndarray, rank: int) -> float | None:
    """Attainable projector error, or None where no gap separates the subspace."""
    ordered = np.sort(spectrum)[::-1]
    gap = ordered[rank - 1] - ordered[rank]
    if gap <= 1e-6 * ordered[0]:
        return None
    eps = np.finfo(np.float32).eps
    return max(1e-4, 50 * eps * ordered[0] / gap)


def projector_error(vectors: np.ndarray, oracle: np.ndarray) -> float:
    """The spectral distance of the projectors on two column spans."""
    a, b = np.asarray(vectors, np.float64), np.asarray(oracle, np.float64)
    return float(np.linalg.norm(a @ a.T - b @ b.T, 2))


def orthonormality_error(vectors: np.ndarray) -> float:
    """Largest entry of `VᵀV − I`."""
    v = np.asarray(vectors, np.float64)
    return float(np.abs(v.T @ v - np.eye(v.shape[1])).max())
