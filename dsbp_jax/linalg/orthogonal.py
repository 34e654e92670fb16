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
from dsbp_jax.meshes import vary, varying_axes

# The second Cholesky-QR round leaves an error of a few eps where the Gram matrix
# of its input is within this distance of the identity.
_GRAM_TOLERANCE = 0.3

# What one Newton-Schulz step brings down to some eps, and to less than one.
_CLOSE = 3e-3
_NEAR = 3e-4


def _cholesky_qr(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One round: `w R⁻¹` with `RᵀR = wᵀw`, and that Gram matrix."""
    gram = w.T @ w
    return w @ _inverse_factor(gram).T, gram


@one_by_one
def _inverse_factor(gram: jax.Array) -> jax.Array:
    """`R⁻ᵀ` of `gram = RᵀR`, whatever the scales of its rows."""
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    squares = jnp.sum(gram * identity, axis=0)
    scale = jnp.where(squares > 0, jax.lax.rsqrt(squares), 0)
    # Columns are scaled here, where only small matrices are touched.
    scaled = scale[:, None] * gram * scale[None, :]
    factor = jax.lax.linalg.cholesky(scaled, symmetrize_input=False)
    return solve_triangular(factor, identity * scale[None, :], lower=True)


#: The Q factor of Householder QR.
orthonormal = one_by_one(lambda x: jnp.linalg.qr(x)[0])


def _is_identity(gram: jax.Array, tolerance: float) -> jax.Array:
    # A sum of squares keeps a NaN, which a maximum may lose.
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jnp.sum((gram - identity) ** 2) <= tolerance**2


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
    w, _ = _cholesky_qr(project_out(unit_scale(block)[0]))
    w, gram = _cholesky_qr(project_out(w))
    broke_down = ~_is_identity(gram, _GRAM_TOLERANCE)

    def householder() -> jax.Array:
        # Zero columns go last: QR would invent a direction for each. Products move
        # columns, since they compile faster than slices.
        filled = jnp.round(jnp.sum(basis**2)).astype(jnp.int32)
        width, rank = basis.shape[1], block.shape[1]
        to = jnp.arange(width + rank, dtype=jnp.int32)
        source = jnp.where(to < filled, to, width + to - filled)
        source = jnp.where(to < filled + rank, source, to - rank)
        move = lambda x, flags: x @ flags.astype(x.dtype)
        columns = jnp.concatenate([basis, block], axis=1)
        q = orthonormal(move(columns, to[:, None] == source[None, :]))
        return move(q, to[:, None] == filled + to[None, :rank])

    robust = jax.lax.cond(unbatched_max(broke_down) > 0, householder, lambda: w)
    return jnp.where(broke_down, robust, w)


@jax.jit
def orthonormal_columns(block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis of what the columns of a block span, in two factors.

    One round of Cholesky-QR, or where that is not enough `extend_basis`, and one
    Newton-Schulz step that is left to the caller, who may join it with other products.

    Args:
      block: Shape `(d, k)`, `k ≤ d`, any rank, finite, its squares too.

    Returns:
      Columns W of shape `(d, k)` and a matrix N of shape `(k, k)`, near the identity:
      WN is orthonormal. Directions that the block does not have are filled up.

    References:
      [P] Fukaya et al., CholeskyQR2, 2014; Björck and Bowie, 1971, as in `polish`.

    Example:
      >>> w, n = orthonormal_columns(jnp.array([[0.0], [2.0]]))
      >>> print(jnp.abs(w @ n))
      [[0.]
       [1.]]
    """
    with jax.default_matmul_precision("highest"):
        w, _ = _cholesky_qr(block)
        gram = w.T @ w
        rough = ~_is_identity(gram, _NEAR)

        def better() -> tuple[jax.Array, jax.Array]:
            nothing = jnp.zeros((len(block), 0), block.dtype)
            identity = jnp.eye(len(gram), dtype=gram.dtype)
            return extend_basis(nothing, block), vary(identity, varying_axes(gram))

        robust = jax.lax.cond(unbatched_max(rough) > 0, better, lambda: (w, gram))
        pick = lambda a, b: jnp.where(rough, a, b)
        w, gram = jax.tree.map(pick, robust, (w, gram))
        return w, 1.5 * jnp.eye(len(gram), dtype=gram.dtype) - 0.5 * gram


def unit_scale(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix over its largest entry, and that: squares would lose 1e±30.

    Args:
      x: Shape `(d, k)`; may be a transposed view, as of `left_product`.

    Returns:
      The matrix, and its scale, 1 where it is zero.

    Example:
      >>> unit_scale(jnp.array([[-4.0, 2.0]]))[1]
      Array(4., dtype=float32)
    """
    largest = jnp.maximum(jnp.max(x), -jnp.min(x))
    largest = jnp.where(largest > 0, largest, 1)
    # A small product, which compiles in a tenth of the time of a transposing loop.
    return x @ (jnp.eye(x.shape[1], dtype=x.dtype) / largest), largest


def polish(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One Newton-Schulz step towards the nearest orthonormal columns.

    Squares the error of nearly orthonormal columns, so that rounding does not
    add up over thousands of refreshes.

    Args:
      vectors: Shape `(d, k)`, orthonormal up to a small error.

    Returns:
      The improved columns, shape `(d, k)`, and whether the error was small enough
      (3e-3 or less in norm, NaN is not) for them to be orthonormal up to rounding.

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
    close = _is_identity(gram, _CLOSE)
    return vectors @ (1.5 * identity - 0.5 * gram), close
