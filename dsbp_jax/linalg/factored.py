"""The operator of a matrix that is known as a product, and not formed.

A weight gradient is `XᵀΔ`, of few rows often: what follows it needs thin products with
X and Δ only, and not a matrix of the kernel's size.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from dsbp_jax.linalg.operators import (
    SymmetricOperator,
    left_product,
    require_floating,
)

_PROBES = 16


def _half(a: jax.Array, b: jax.Array, v: jax.Array) -> jax.Array:
    thin, rows = left_product(a, v), len(b)
    return jnp.concatenate([left_product(b, thin[:rows]), thin[rows:]])


def _matmat(a: jax.Array, b: jax.Array, v: jax.Array) -> jax.Array:
    half, columns = _half(a, b, v), b.shape[1]
    return a @ jnp.concatenate([b @ half[:columns], half[columns:]])


def product_gram(a: jax.Array, b: jax.Array) -> SymmetricOperator:
    """The operator `GGᵀ + MMᵀ` of `G = A₁b` and M, for `a = [A₁, M]`.

    Args:
      a: Shape `(d, n + m)`, any floating dtype; read as float32.
      b: Shape `(n, p)`.

    Returns:
      An operator of dimension d with a factor. Its trace is an estimate from 16 fixed
      random signs for each row, unbiased over signs (Hutchinson).

    Raises:
      ValueError: The arguments are not floating-point matrices with entries, or b has
        more rows than a has columns.

    References:
      [T] `GGᵀv = A₁(b(bᵀ(A₁ᵀv)))`. [P] Hutchinson, A stochastic estimator of the
      trace, 1989.

    Example:
      >>> operator = product_gram(jnp.array([[3.0], [0.0]]), jnp.array([[2.0, 0.0]]))
      >>> print(operator.matmat(jnp.eye(2)))
      [[36.  0.]
       [ 0.  0.]]
    """
    require_floating("a", a, 2)
    require_floating("b", b, 2)
    if b.shape[0] > a.shape[1]:
        raise ValueError(
            f"b must have at most {a.shape[1]} rows to fit a, got shape {b.shape}"
        )
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    signs = jax.random.rademacher(jax.random.key(0), (len(a), _PROBES), jnp.float32)
    with jax.default_matmul_precision("highest"):
        image = _half(a, b, signs)
        trace = jnp.vdot(image, image) / _PROBES
    return SymmetricOperator(
        matmat=Partial(_matmat, a, b),
        dim=len(a),
        trace=trace,
        half=Partial(_half, a, b),
    )
