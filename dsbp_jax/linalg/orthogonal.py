"""Orthonormal blocks: extend a basis by a block, whatever the block's rank.

Two rounds of Cholesky-QR are several times faster than Householder QR at the
tall and thin shapes met here, but break down where the block is close to rank
deficient. The breakdown shows in the second round's Gram matrix, which is close
to the identity exactly when the first round worked; then, and only then,
Householder QR takes over.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from dsbp_jax.linalg.batching import unbatched_max

# The second Cholesky-QR round leaves an error of a few eps where the Gram matrix
# of its input is within this distance of the identity.
_GRAM_TOLERANCE = 0.3


def _cholesky_qr(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One round: `w L⁻ᵀ` with `LLᵀ = wᵀw`, and that Gram matrix."""
    gram = w.T @ w
    factor = jnp.linalg.cholesky(gram)
    identity = jnp.eye(gram.shape[0], dtype=w.dtype)
    return w @ solve_triangular(factor, identity, lower=True).T, gram


def _normalize_columns(w: jax.Array) -> jax.Array:
    # By the largest entry first: a norm squares, and would lose 1e±30.
    largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    w = w / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(w, axis=0, keepdims=True)
    return w / jnp.where(norm > 0, norm, 1)


def extend_basis(basis: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    """Writes an orthonormal basis of a block's new directions into a buffer.

    Args:
      basis: Buffer of shape `(d, m)`, float32. Columns before `start` are
        orthonormal, all others zero; `m ≤ d`.
      block: Shape `(d, k)`, any rank and scale; finite.
      start: First column to write, int32, with `start + k ≤ m`.

    Returns:
      The buffer with columns `start : start + k` set: orthonormal, orthogonal to
      the earlier ones, and together with them spanning the block.

    References:
      Fukaya et al., CholeskyQR2, 2014. Giraud et al., twice is enough, 2005.

    Example:
      >>> buffer = jnp.eye(3, 2) * jnp.array([1.0, 0.0])
      >>> block = jnp.array([[5.0], [0.0], [2.0]])
      >>> print(jnp.abs(extend_basis(buffer, block, jnp.int32(1))))
      [[1. 0.]
       [0. 0.]
       [0. 1.]]
    """
    rank = block.shape[1]
    project_out = lambda w: w - basis @ (basis.T @ w)

    # A residual at rounding level points back into the basis once normalised:
    # hence one projection more than exact arithmetic would need.
    w = _normalize_columns(project_out(_normalize_columns(block)))
    w, _ = _cholesky_qr(_normalize_columns(project_out(w)))
    w, gram = _cholesky_qr(project_out(w))
    error = jnp.max(jnp.abs(gram - jnp.eye(rank, dtype=gram.dtype)))
    broke_down = ~(error <= _GRAM_TOLERANCE)  # true for NaN, too

    def householder() -> jax.Array:
        filled = jax.lax.dynamic_update_slice_in_dim(
            basis, _normalize_columns(block), start, axis=1
        )
        q, _ = jnp.linalg.qr(filled)
        return jax.lax.dynamic_slice_in_dim(q, start, rank, axis=1)

    robust = jax.lax.cond(unbatched_max(broke_down) > 0, householder, lambda: w)
    w = jnp.where(broke_down, robust, w)
    return jax.lax.dynamic_update_slice_in_dim(basis, w, start, axis=1)


def polish(vectors: jax.Array) -> jax.Array:
    """One Newton-Schulz step towards the nearest orthonormal columns.

    Squares the error of nearly orthonormal columns, so that rounding does not
    add up over thousands of refreshes.

    Args:
      vectors: Shape `(d, k)`, orthonormal up to a small error.

    Returns:
      Shape `(d, k)`, orthonormal up to rounding.

    Example:
      >>> print(polish(1.001 * jnp.eye(2)).round(5))
      [[1. 0.]
       [0. 1.]]
    """
    identity = jnp.eye(vectors.shape[1], dtype=vectors.dtype)
    return vectors @ (1.5 * identity - 0.5 * (vectors.T @ vectors))
