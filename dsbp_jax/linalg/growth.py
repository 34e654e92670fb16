"""Eigenbases that grow by what another one has outside of them."""

import jax.numpy as jnp
import numpy as np

from dsbp_jax.linalg.basis import EigenBasis

_ROUNDING = 1e-6  # of the trace: what float32 eigenvectors leave over


def grow_basis(basis: EigenBasis, other: EigenBasis, energy: float = 1.0) -> EigenBasis:
    """A basis that spans another, and enough of a second one.

    Of the second covariance `UMUᵀ` the fewest directions outside of the first are added
    with which the span holds the share `energy` of its trace, or all of the second
    basis where that holds less. Eigenvalues are those of the sum of both covariances
    inside of the span.

    Computed on the host in double precision: ranks are known when it is done.

    Args:
      basis: What is kept whole, vectors of shape `(*batch, d, k)`.
      other: What it grows by, `(*batch, d, m)`.
      energy: Of the second trace, in (0, 1].

    Returns:
      The basis of `k` to `min(d, k + m)` columns; members of a stack grow alike, by
      what the neediest needs.

    References:
      [P] Saha, Garg and Roy, Gradient projection memory, ICLR 2021, for the growth.
      [O] The eigenvalues: METHODS section 7.

    Example:
      >>> import jax.numpy as jnp
      >>> one = lambda i, value: EigenBasis(
      ...     jnp.eye(3)[:, i : i + 1], jnp.array([value]), jnp.array(value))
      >>> grown = grow_basis(one(0, 2.0), one(2, 3.0))
      >>> grown.vectors.shape, grown.values.tolist()
      ((3, 2), [3.0, 2.0])
    """
    first, second = (
        [np.asarray(part, np.float64) for part in given] for given in (basis, other)
    )
    root = lambda vectors, values, _: (
        vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    )
    v, left, right = first[0], root(*first), root(*second)
    inside = np.swapaxes(v, -1, -2) @ right
    rest = right - v @ inside
    rest -= v @ (np.swapaxes(v, -1, -2) @ rest)
    new, sizes, _ = np.linalg.svd(rest, full_matrices=False)
    gained = sizes**2
    held = np.sum(inside**2, axis=(-2, -1))[..., None] + np.cumsum(gained, -1) - gained
    total = second[2][..., None]
    needed = (held < (energy - _ROUNDING) * total) & (gained > _ROUNDING * total)
    count = min(int(needed.sum(axis=-1).max(initial=0)), v.shape[-2] - v.shape[-1])
    columns = np.concatenate([v, new[..., :count]], axis=-1)
    # Of a member that needs fewer, what is left over may point anywhere.
    columns = np.linalg.qr(columns)[0]
    thin = np.swapaxes(columns, -1, -2) @ np.concatenate([left, right], axis=-1)
    values, turn = np.linalg.eigh(thin @ np.swapaxes(thin, -1, -2))
    vectors = columns @ turn[..., ::-1]
    found = vectors, values[..., ::-1], first[2] + second[2]
    return EigenBasis(*(jnp.asarray(part, jnp.float32) for part in found))
