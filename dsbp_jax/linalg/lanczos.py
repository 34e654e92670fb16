"""Lanczos with full re-orthogonalisation, by single vectors and by blocks.

`block_lanczos` is the Krylov block of one refresh, by which `dsbp_jax.linalg.basis`
starts and tracks bases; `lanczos` tridiagonalises, for diagnostics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.linalg.operators import SymmetricOperator
from dsbp_jax.linalg.orthogonal import extend_basis


class Lanczos(NamedTuple):
    """A partial tridiagonalisation `CQ = QT + r e_mᵀ`.

    Attributes:
      vectors: Orthonormal Q, shape `(d, m)`, float32.
      alphas: Diagonal of T, shape `(m,)`, float32.
      betas: Off-diagonal of T, shape `(m - 1,)`, float32, not negative; zero
        where an invariant subspace was found and a new direction begun.
      residual: The vector r, shape `(d,)`, float32.
    """

    vectors: jax.Array
    alphas: jax.Array
    betas: jax.Array
    residual: jax.Array

    def tridiagonal(self) -> jax.Array:
        """The matrix T, shape `(m, m)`; its eigenvalues approximate C's."""
        off_diagonal = jnp.diag(self.betas, 1)
        return jnp.diag(self.alphas) + off_diagonal + off_diagonal.T


def lanczos(operator: SymmetricOperator, start: jax.Array, num_steps: int) -> Lanczos:
    """Runs Lanczos with full re-orthogonalisation; safe at breakdown.

    Where the Krylov space is exhausted (an invariant subspace, a zero matrix),
    the iteration goes on from a coordinate vector orthogonal to all before, with
    a zero in `betas`: the identity and the orthonormality hold regardless.

    Args:
      operator: The matrix C, of dimension d.
      start: First direction, shape `(d,)`; need not be normalised. Zero stands
        for the first coordinate vector.
      num_steps: Number m of steps, `1 ≤ m ≤ d`.

    Returns:
      The tridiagonalisation.

    Raises:
      ValueError: `num_steps` or the shape of `start` does not fit.

    References:
      [P] Golub and Van Loan, Matrix Computations, 2013, section 10.3. [O] What
      follows a breakdown.

    Example:
      >>> from dsbp_jax import linalg
      >>> c = linalg.matrix(jnp.diag(jnp.array([1.0, 2.0, 3.0])))
      >>> t = linalg.lanczos(c, jnp.ones(3), 3).tridiagonal()
      >>> print(jnp.linalg.eigvalsh(t).round(4))
      [1. 2. 3.]
    """
    if start.shape != (operator.dim,):
        raise ValueError(
            f"start must have shape ({operator.dim},) to fit the operator, "
            f"got {start.shape}"
        )
    num_steps = checks.positive_int("num_steps", num_steps, maximum=operator.dim)
    with jax.default_matmul_precision("highest"):
        return _lanczos(operator, start.astype(jnp.float32), num_steps)


def _norm(w: jax.Array) -> jax.Array:
    """Euclidean norm of a vector of any scale: squares would lose 1e±30."""
    largest = jnp.max(jnp.abs(w))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.linalg.norm(w / scale)


def _unit(w: jax.Array) -> jax.Array:
    norm = _norm(w)
    return w / jnp.where(norm > 0, norm, 1)


def _lanczos(operator: SymmetricOperator, start: jax.Array, num_steps: int) -> Lanczos:
    eps = jnp.finfo(jnp.float32).eps

    def orthogonalize(vectors: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(2):
            w = w - vectors @ (vectors.T @ w)
        return w

    def fresh_direction(vectors: jax.Array) -> jax.Array:
        # The coordinate vector that the basis covers least.
        row = jnp.argmin(jnp.sum(vectors**2, axis=1))
        coordinate = jax.nn.one_hot(row, operator.dim, dtype=jnp.float32)
        return orthogonalize(vectors, coordinate)

    def next_vector(vectors: jax.Array, w: jax.Array, vanished: jax.Array) -> jax.Array:
        w = _unit(jnp.where(vanished, fresh_direction(vectors), w))
        # Normalising magnifies what rounding left along the basis.
        return _unit(orthogonalize(vectors, w))

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, tuple]:
        vectors, q, scale = carry
        vectors = vectors.at[:, i].set(q)
        w = operator.matmat(q[:, None])[:, 0]
        alpha = q @ w
        scale = jnp.maximum(scale, _norm(w))
        w = orthogonalize(vectors, w)
        vanished = _norm(w) <= 10 * eps * scale
        beta = jnp.where(vanished, 0.0, _norm(w))
        return (vectors, next_vector(vectors, w, vanished), scale), (alpha, beta, w)

    vectors = jnp.zeros((operator.dim, num_steps), jnp.float32)
    coordinate = jax.nn.one_hot(0, operator.dim, dtype=jnp.float32)
    first = jnp.where(_norm(start) == 0, coordinate, _unit(start))
    carry, (alphas, betas, residuals) = jax.lax.scan(
        step, (vectors, first, jnp.float32(0)), jnp.arange(num_steps)
    )
    return Lanczos(carry[0], alphas, betas[:-1], residuals[-1])


def block_lanczos(
    operator: SymmetricOperator, start: jax.Array, outside: jax.Array, num_blocks: int
) -> tuple[jax.Array, jax.Array]:
    """The Krylov block `[V, CV, …, C^{b-1}V]`, orthonormal, and its image.

    The products that build a block also give its image, from which a projection of C
    is assembled: nothing is multiplied twice.

    Args:
      operator: The matrix C, of dimension d.
      start: V, orthonormal, shape `(d, k)`, float32.
      outside: The part of CV that is orthogonal to V, at any scale, shape `(d, k)`.
      num_blocks: b, at least 2, with `b·k ≤ d`.

    Returns:
      Q of shape `(d, b·k)`, its first columns V; and `half(Q)` where the operator has
      a factor, CQ otherwise.

    References:
      Golub and Underwood, The block Lanczos method, 1977.

    Example:
      >>> from dsbp_jax import linalg
      >>> c = linalg.matrix(jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0])))
      >>> start = jnp.full((4, 1), 0.5)
      >>> image = c.matmat(start)
      >>> outside = image - start * (start.T @ image)
      >>> q, _ = block_lanczos(c, start, outside, 2)
      >>> print((q.T @ q).round(4))
      [[1. 0.]
       [0. 1.]]
    """
    dim, rank = start.shape
    # With a factor the images are half(Q), without one they are CQ.
    image = operator.matmat if operator.half is None else operator.half
    first = image(start)

    if num_blocks == 2:
        block = extend_basis(start, outside)
        q = jnp.concatenate([start, block], axis=1)
        images = jnp.concatenate([first, image(block)], axis=1)
    else:
        width = num_blocks * rank
        write = lambda buffer, block, index: jax.lax.dynamic_update_slice_in_dim(
            buffer, block, index * rank, 1
        )
        q = jnp.zeros((dim, width), jnp.float32).at[:, :rank].set(start)
        images = jnp.zeros((first.shape[0], width), jnp.float32).at[:, :rank].set(first)

        def step(index: jax.Array, carry: tuple) -> tuple:
            q, images, outside = carry
            block = extend_basis(q, outside)
            q, images = write(q, block, index), write(images, image(block), index)
            product = operator.matmat(block)
            return q, images, product - q @ (q.T @ product)

        # The last block's product under C leads nowhere, hence it is peeled off.
        carry = jax.lax.fori_loop(1, num_blocks - 1, step, (q, images, outside))
        q, images, outside = carry
        block = extend_basis(q[:, :-rank], outside)
        q = write(q, block, num_blocks - 1)
        images = write(images, image(block), num_blocks - 1)
    return q, images
