"""The leading part of a matrix that moves, followed by power steps.

For a matrix X of shape `(n, d)` and orthonormal columns V of shape `(d, k)`, X is split
as `thin·Vᵀ + rest` with `thin = XV`. One power step follows X without lag: V leaves it
spanning `XᵀX` times what it spanned before, and `thin` is that of the new V, although
only two products with X were made. A filter that uses V in the same step makes the
third.

X itself comes as stored, `(…, a, b)`. On the output side V has b rows, and `X` is what
is stored; on the input side V has a rows, and X is its transpose.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.batching import unbatched_max
from dsbp_jax.linalg.basis import ascending_eigenpairs
from dsbp_jax.linalg.operators import left_product
from dsbp_jax.linalg.orthogonal import orthonormal_columns
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.stacks import places, unstacked

_LIMIT = jnp.iinfo(jnp.int32).max  # more than anyone's steps


class Leading(NamedTuple):
    """The leading part of stacked matrices.

    Attributes:
      vectors: V, orthonormal columns, shape `(…, d, k)`.
      thin: `XV` up to a given scale, shape `(…, n, k)`.
      values: Eigenvalues of `thinᵀ·thin`, descending, shape `(…, k)`.
      rotation: Their eigenvectors E, shape `(…, k, k)`; the identity after a step.
    """

    vectors: jax.Array
    thin: jax.Array
    values: jax.Array
    rotation: jax.Array


def times(x: jax.Array, v: jax.Array, side: str) -> jax.Array:
    """`XV` of matrices as stored, shape `(…, n, k)`."""
    return x @ v if side == "output" else left_product(x, v)


def times_transposed(x: jax.Array, q: jax.Array, side: str) -> jax.Array:
    """`XᵀQ` of matrices as stored, shape `(…, d, k)`."""
    return left_product(x, q) if side == "output" else x @ q


def expand(thin: jax.Array, v: jax.Array, side: str) -> jax.Array:
    """`thin·Vᵀ`, stored as X is, shape `(…, a, b)`."""
    return thin @ v.mT if side == "output" else v @ thin.mT


def principal(thin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenpairs of `thinᵀ·thin`, descending.

    Args:
      thin: Shape `(…, n, k)`.

    Returns:
      Values `(…, k)`, not negative, and vectors `(…, k, k)`.

    Example:
      >>> print(principal(jnp.diag(jnp.array([1.0, 3.0])))[0])
      [9. 1.]
    """
    values, rotation = _each(ascending_eigenpairs, thin.mT @ thin)
    return jnp.maximum(values[..., ::-1], 0), rotation[..., ::-1]


def follow_leading(
    xs: Sequence[jax.Array],
    vectors: jax.Array,
    scales: jax.Array,
    steps: jax.Array,
    *,
    side: str,
) -> tuple[Leading, jax.Array, jax.Array]:
    """The leading parts of matrices of one shape, after some power steps.

    Args:
      xs: m matrices or stacks of them, each `(*batch, a, b)`, float32 or float64.
      vectors: Their carried columns, shape `(m, *batch, d, k)`, of the same dtype.
      scales: What to multiply `XV` by, shape `(m, *batch)`; a power step does not
        depend on it.
      steps: How many power steps each is to make, shape `(m, *batch)`, int32. Where
        one makes a step all others but those with a negative number do.
      side: `"output"` or `"input"`.

    Returns:
      The leading parts, with a leading axis of m; which of them moved, to finite
      orthonormal columns (the others keep theirs), shape `(m, *batch)`, bool; and the
      mean squared sine of the angles by which these turned, of that shape.

    References:
      [P] Subspace iteration: Golub and Van Loan, Matrix computations, section 8.2.4.
      [O] With the leading part as by-product: METHODS section 8.

    Example:
      >>> x = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> found, *_ = follow_leading([x], jnp.ones((1, 3, 1)) / 3**0.5, jnp.ones(1),
      ...                            jnp.array([20]), side="output")
      >>> print(found.values)
      [[9.]]
    """
    factor = lambda array: array[..., None, None].astype(vectors.dtype)
    most = unbatched_max(jnp.max(steps))
    axes = varying_axes(*xs, vectors, scales, steps)
    numbers = vary(places(most < _LIMIT, len(xs)), axes)

    def stacked(product: Callable, operand: jax.Array) -> jax.Array:
        each = (unstacked(operand, number) for number in numbers)
        return jnp.stack([product(x, v, side) for x, v in zip(xs, each, strict=True)])

    def step(carry: tuple) -> tuple:
        count, v, *others = carry
        scaled = lambda product: product * factor(scales)
        q, near = _each(orthonormal_columns, scaled(stacked(times, v)))
        q = q @ near
        image = scaled(stacked(times_transposed, q))  # X ≈ q·imageᵀ
        new, near = _each(orthonormal_columns, image)
        found = new, near, q, (image.mT @ new) @ near
        take = (count < jnp.maximum(steps, 1))[..., None, None]
        pick = lambda new, old: jnp.where(take, new, old)
        return count + 1, *map(pick, found, (v, *others))

    def moved() -> tuple[Leading, jax.Array, jax.Array]:
        rows = xs[0].shape[-2 if side == "output" else -1]
        rank = vectors.shape[-1]
        zeros = lambda *shape: jnp.zeros((*steps.shape, *shape), vectors.dtype)
        square = zeros(rank, rank)
        start = (jnp.int32(0), vectors, square, zeros(rows, rank), square)
        start = vary(start, axes)
        going = lambda carry: carry[0] < most
        _, v, near, q, small = jax.lax.while_loop(going, step, start)
        values, rotation = principal(small)
        eye = jnp.broadcast_to(jnp.eye(rank, dtype=v.dtype), rotation.shape)
        v = v @ (near @ rotation)
        ok = jnp.isfinite(jnp.sum(values, axis=-1) + jnp.sum(v, axis=(-2, -1)))
        ok &= steps >= 0
        v = jnp.where(ok[..., None, None], v, vectors)
        overlap = jnp.sum((vectors.mT @ v) ** 2, axis=(-2, -1))
        turned = jnp.where(ok, jnp.maximum(1 - overlap / rank, 0), 0)
        return vary((Leading(v, q @ (small @ rotation), values, eye), ok, turned), axes)

    def still() -> tuple[Leading, jax.Array, jax.Array]:
        thin = stacked(times, vectors) * factor(scales)
        none = jnp.zeros(steps.shape, vectors.dtype)
        return vary((Leading(vectors, thin, *principal(thin)), none > 0, none), axes)

    with jax.default_matmul_precision("highest"):
        return jax.lax.cond(most > 0, moved, still)


def _each(function: Callable, stack: jax.Array) -> Any:
    """A function of one matrix on each of a stack `(…, ·, ·)`."""
    batch, shape = stack.shape[:-2], stack.shape[-2:]
    matrices = stack.reshape(-1, *shape)
    if len(matrices) == 1:  # no loop for one
        found = jax.tree.map(lambda x: x[None], function(matrices[0]))
    else:
        found = jax.vmap(function)(matrices)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)
