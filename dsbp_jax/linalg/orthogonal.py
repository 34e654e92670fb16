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

from dsbp_jax.batching import one_by_one, unbatched_max

# The second Cholesky-QR round leaves an error of a few eps where the Gram matrix
# of its input is within this distance of the identity.
_GRAM_TOLERANCE = 0.3


def _cholesky_qr(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One round: `w L⁻ᵀ` with `LLᵀ = wᵀw`, and that Gram matrix."""
    gram = w.T @ w
    return w @ _inverse_factor(gram).T, gram


@one_by_one
def _inverse_factor(gram: jax.Array) -> jax.Array:
    factor = jnp.linalg.cholesky(gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return solve_triangular(factor, identity, lower=True)


#: The Q factor of Householder QR.
orthonormal = one_by_one(lambda x: jnp.linalg.qr(x)[0])


def _is_identity(gram: jax.Array, tolerance: float) -> jax.Array:
    # Entry by entry: a maximum may lose a NaN, which a comparison does not.
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jnp.all(jnp.abs(gram - identity) <= tolerance)


def _normalize_columns(w: jax.Array) -> jax.Array:
    # By the largest entry first: a norm squares, and would lose 1e±30.
    largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    w = w / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(w, axis=0, keepdims=True)
    return w / jnp.where(norm > 0, norm, 1)


def extend_basis(basis: jax.Array, block: jax.Array) -> jax.Array:
    """An orthonormal basis of the directions that a block adds to a basis.

    Args:
      basis: Shape `(d, m)`, float32. Leading columns orthonormal, any others zero.
      block: What is left of the new directions outside the basis, up to rounding;
        shape `(d, k)`, any rank and scale, finite; `m' + k ≤ d` for m' columns
        that are not zero.

    Returns:
      Shape `(d, k)`: orthonormal, orthogonal to the basis, and together with it
      spanning the block.

    References:
      [P] Fukaya et al., CholeskyQR2, 2014; Giraud et al., twice is enough, 2005.
      [O] Which of the two QRs, and when: METHODS section 0.

    Example:
      >>> print(jnp.abs(extend_basis(jnp.eye(3, 1), jnp.array([[0.0], [0.0], [2.0]]))))
      [[0.]
       [0.]
       [1.]]
    """
    # The products of the accelerators' own choice are good to three digits only.
    with jax.default_matmul_precision("highest"):
        return _extend(basis, block)


@jax.jit  # one program, out of which no NaN of a breakdown comes
def _extend(basis: jax.Array, block: jax.Array) -> jax.Array:
    project_out = lambda w: w - basis @ (basis.T @ w)

    # A block at rounding level points back into the basis once normalised: hence
    # two more projections, one more than exact arithmetic would need.
    w, _ = _cholesky_qr(_normalize_columns(project_out(_normalize_columns(block))))
    w, gram = _cholesky_qr(project_out(w))
    broke_down = ~_is_identity(gram, _GRAM_TOLERANCE)

    def householder() -> jax.Array:
        # Zero columns go last: QR would invent a direction for each.
        filled = jnp.any(basis != 0, axis=0)
        columns = jnp.concatenate([basis, _normalize_columns(block)], axis=1)
        is_zero = jnp.concatenate([~filled, jnp.zeros(block.shape[1], bool)])
        order = jnp.argsort(is_zero, stable=True)
        q = orthonormal(columns[:, order])
        return jax.lax.dynamic_slice_in_dim(q, jnp.sum(filled), block.shape[1], 1)

    robust = jax.lax.cond(unbatched_max(broke_down) > 0, householder, lambda: w)
    return jnp.where(broke_down, robust, w)


def polish(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One Newton-Schulz step towards the nearest orthonormal columns.

    Squares the error of nearly orthonormal columns, so that rounding does not
    add up over thousands of refreshes.

    Args:
      vectors: Shape `(d, k)`, orthonormal up to a small error.

    Returns:
      The improved columns, shape `(d, k)`, and whether the error was small enough
      (1e-3 or less, NaN is not) for them to be orthonormal up to rounding.

    References:
      [P] Björck and Bowie, An iterative algorithm for computing the best estimate of
      an orthogonal matrix, 1971.

    Example:
      >>> print(polish(1.0001 * jnp.eye(2))[0])
      [[1.00000 0.00000]
       [0.00000 1.00000]]
    """
    gram = vectors.T @ vectors
    identity = jnp.eye(vectors.shape[1], dtype=vectors.dtype)
    close = _is_identity(gram, 1e-3)
    return vectors @ (1.5 * identity - 0.5 * gram), close
