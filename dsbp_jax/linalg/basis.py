"""The eigenbasis of a symmetric operator: started, refreshed, solved.

One refresh is one cycle of thick-restarted block Lanczos. From the carried
orthonormal V it builds the Krylov block `[V, CV, …, C^{b-1}V]`, orthonormalised
block by block, projects C on it (Rayleigh-Ritz) and keeps the best k Ritz
vectors. Warm, a single refresh follows a drifting C; cold, refreshes are
repeated until the residual is at rounding level.

Where the Krylov block would fill the whole space, the dense matrix is formed and
solved instead: the same answer, cheaper.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.batching import one_by_one, unbatched_max
from dsbp_jax.linalg.lanczos import block_lanczos
from dsbp_jax.linalg.operators import SymmetricOperator
from dsbp_jax.linalg.orthogonal import orthonormal, polish, unit_scale

_TINY = 1e-30


class EigenBasis(NamedTuple):
    """The leading eigenpairs of a symmetric operator.

    Attributes:
      vectors: Orthonormal columns, shape `(…, d, k)`, float32.
      values: Their eigenvalues, descending, shape `(…, k)`, float32.
      trace: Trace of the operator, shape `(…)`, float32; zero where it is not known.
    """

    vectors: jax.Array
    values: jax.Array
    trace: jax.Array


class RefreshInfo(NamedTuple):
    """What a refresh saw and did, for the reader; the next refresh needs none of it.

    Attributes:
      residual: `‖CV − V(VᵀCV)‖_F / ‖CV‖_F` of the basis that came in: how far it
        was from spanning an invariant subspace. Shape `(…)`, float32.
      ok: Whether the result was finite and orthonormal; where not, the old basis
        was kept. Shape `(…)`, bool.
    """

    residual: jax.Array
    ok: jax.Array


def init_basis(dim: int, rank: int, *, key: jax.Array) -> EigenBasis:
    """A random orthonormal start: uniform over subspaces, eigenvalues unknown (0).

    Args:
      dim: Dimension d of the operator to come.
      rank: Number k of columns, `1 ≤ k ≤ d`.
      key: A PRNG key.

    Returns:
      A basis of shape `(d, k)` with zero values and trace.

    Raises:
      ValueError: `rank` does not fit.

    References:
      [T] The Q factor of a Gaussian matrix spans a uniform subspace.

    Example:
      >>> init_basis(5, 2, key=jax.random.key(0)).vectors.shape
      (5, 2)
    """
    dim = checks.positive_int("dim", dim)
    rank = checks.positive_int("rank", rank, maximum=dim)
    vectors = _random_columns(key, dim, rank)
    return EigenBasis(vectors, jnp.zeros(rank, jnp.float32), jnp.float32(0))


@functools.partial(jax.jit, static_argnums=(1, 2))  # one program in an eager `init`
def _random_columns(key: jax.Array, dim: int, rank: int) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        gaussian = jax.random.normal(key, (dim, rank), jnp.float32)
        return polish(orthonormal(gaussian))[0]


def refresh_basis(
    operator: SymmetricOperator, basis: EigenBasis, *, num_blocks: int = 2
) -> EigenBasis:
    """One warm refresh: the basis moves towards the operator's top eigenvectors.

    Costs `2·num_blocks − 1` products of a data matrix with k columns where the
    operator has a factor (`gram`), `num_blocks` products with C otherwise.

    Args:
      operator: The matrix C, of dimension d.
      basis: The carried basis, `(d, k)`.
      num_blocks: Krylov blocks including V itself, at least 2. Two suffice to
        track; spectra with a small gap want 3 or 4.

    Returns:
      The new basis. Where the result would not be finite and orthonormal (C holds
      a NaN), the basis that came in.

    Raises:
      ValueError: Shapes do not fit, or `num_blocks` is not an int of at least 2.

    References:
      [P] Golub and Underwood, The block Lanczos method, 1977; Wu and Simon,
      Thick-restart Lanczos, 2000. [O] One warm cycle a refresh: METHODS section 0.

    Example:
      >>> from dsbp_jax import linalg
      >>> operator = linalg.matrix(jnp.diag(jnp.array([1.0, 9.0, 4.0, 2.0])))
      >>> basis = linalg.init_basis(4, 2, key=jax.random.key(0))
      >>> print(linalg.refresh_basis(operator, basis).values.round(3))
      [9. 4.]
    """
    return refresh_with_info(operator, basis, num_blocks=num_blocks)[0]


def refresh_with_info(
    operator: SymmetricOperator,
    basis: EigenBasis,
    *,
    num_blocks: int = 2,
    tolerance: float | jax.Array = 0.0,
) -> tuple[EigenBasis, RefreshInfo]:
    """`refresh_basis`, with a tolerance and an account of what happened.

    Args:
      operator: The matrix C, of dimension d.
      basis: The carried basis, `(d, k)`.
      num_blocks: Krylov blocks including V itself, at least 2.
      tolerance: While the residual of `RefreshInfo` is at most this, in [0, 1], the
        space is kept and only rotated to its Ritz vectors. Saves all but the first
        product. A static 0 traces no test.

    Returns:
      The new basis and the account.

    Raises:
      ValueError: Shapes do not fit, `num_blocks` is not an int of at least 2, or
        `tolerance` is outside of [0, 1].

    References:
      [P] Block Lanczos and restart: Golub and Underwood, 1977; Wu and Simon, 2000.
      [O] The tolerance: METHODS section 0.

    Example:
      >>> from dsbp_jax import linalg
      >>> operator = linalg.matrix(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
      >>> start = linalg.EigenBasis(jnp.eye(3, 1), jnp.zeros(1), jnp.zeros(()))
      >>> linalg.refresh_with_info(operator, start)[1].residual
      Array(0., dtype=float32)
    """
    dim, rank = basis.vectors.shape
    if dim != operator.dim:
        raise ValueError(
            f"basis must have {operator.dim} rows to fit the operator, got {dim}"
        )
    num_blocks = checks.positive_int("num_blocks", num_blocks, minimum=2)
    checks.in_unit_interval("tolerance", tolerance)
    with jax.default_matmul_precision("highest"):
        image = operator.matmat(basis.vectors)
        image, scale = unit_scale(image)
        inside = basis.vectors.T @ image
        outside = image - basis.vectors @ inside
        norm = jnp.maximum(jnp.linalg.norm(image), _TINY)
        residual = jnp.linalg.norm(outside) / norm

        def solve() -> tuple[EigenBasis, jax.Array]:
            if num_blocks * rank >= dim:
                return _dense_eigenpairs(operator, rank)
            return _krylov_eigenpairs(operator, basis.vectors, outside, num_blocks)

        def rotate() -> tuple[EigenBasis, jax.Array]:
            values, rotation = _keep_top(
                *ascending_eigenpairs(0.5 * (inside + inside.T)), rank
            )
            return _finish(operator, basis.vectors @ rotation, values * scale)

        if checks.is_static(tolerance, 0):
            new, ok = solve()
        else:
            # NaN counts as not invariant, and is then refused by the solution.
            invariant = residual <= tolerance
            rotated, sound = rotate()
            new, ok = jax.lax.cond(
                unbatched_max(~invariant) > 0, solve, lambda: (rotated, sound)
            )
            pick = lambda a, b: jnp.where(invariant, a, b)
            new, ok = jax.tree.map(pick, (rotated, sound), (new, ok))
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, basis)
    return new, RefreshInfo(residual, ok)


def _keep_top(eigenvalues: jax.Array, vectors: jax.Array, rank: int) -> tuple:
    """The last `rank` of ascending eigenpairs, in descending order."""
    return eigenvalues[::-1][:rank], vectors[:, ::-1][:, :rank]


@one_by_one
def _eigh(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    vectors, values = jax.lax.linalg.eigh(c, symmetrize_input=False)
    return values, vectors


def ascending_eigenpairs(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ascending eigenpairs of a symmetric matrix of any scale."""
    c, scale = unit_scale(c)
    values, vectors = _eigh(c)
    return values * scale, vectors


def _finish(
    operator: SymmetricOperator, vectors: jax.Array, values: jax.Array
) -> tuple[EigenBasis, jax.Array]:
    """Polishes Ritz vectors; also says whether they are sound."""
    vectors, close = polish(vectors)
    ok = close & jnp.isfinite(jnp.sum(values))
    return EigenBasis(vectors, values, operator.trace), ok


def _dense_eigenpairs(
    operator: SymmetricOperator, rank: int
) -> tuple[EigenBasis, jax.Array]:
    c = operator.matmat(jnp.eye(operator.dim, dtype=jnp.float32))
    values, vectors = _keep_top(*ascending_eigenpairs(c), rank)
    return _finish(operator, vectors, values)


def _krylov_eigenpairs(
    operator: SymmetricOperator, start: jax.Array, outside: jax.Array, num_blocks: int
) -> tuple[EigenBasis, jax.Array]:
    """Rayleigh-Ritz on the Krylov block of `start`."""
    rank = start.shape[1]
    q, images = block_lanczos(operator, start, outside, num_blocks)
    if operator.half is None:
        t = q.T @ images
        t = 0.5 * (t + t.T)
    else:
        t = images.T @ images
    values, rotation = _keep_top(*ascending_eigenpairs(t), rank)
    return _finish(operator, q @ rotation, values)


def top_eigenpairs(
    operator: SymmetricOperator,
    rank: int,
    *,
    key: jax.Array,
    num_blocks: int = 4,
    max_restarts: int = 100,
) -> EigenBasis:
    """The largest eigenpairs from a cold start, restarted to convergence.

    A few guard columns are carried beside the k asked for, which speeds up the
    last ones. The iteration ends when the residual `‖CV − VΛ‖_F` of the k pairs
    is at rounding level, when ten restarts have not lowered it by a percent
    together, or after `max_restarts`. Hard spectra (large negative values, tiny
    gaps) may end unconverged: `refresh_with_info(operator, basis)[1].residual`
    tells.

    Args:
      operator: The matrix C, of dimension d.
      rank: Number k of pairs, `1 ≤ k ≤ d`.
      key: A PRNG key for the random start.
      num_blocks: Krylov blocks per restart, at least 2.
      max_restarts: Restarts at the most.

    Returns:
      The k eigenpairs of largest (signed) value. Where C is not finite the values
      are NaN; the vectors are orthonormal always.

    Raises:
      ValueError: `rank`, `num_blocks` or `max_restarts` does not fit.

    References:
      [P] Golub and Underwood, The block Lanczos method, 1977; Wu and Simon,
      Thick-restart Lanczos, 2000. [O] Guard columns and end: METHODS section 0.

    Example:
      >>> from dsbp_jax import linalg
      >>> operator = linalg.matrix(jnp.diag(jnp.arange(100.0)))
      >>> linalg.top_eigenpairs(operator, 3, key=jax.random.key(0)).values.tolist()
      [99.00, 98.00, 97.00]
    """
    rank = checks.positive_int("rank", rank, maximum=operator.dim)
    num_blocks = checks.positive_int("num_blocks", num_blocks, minimum=2)
    max_restarts = checks.positive_int("max_restarts", max_restarts)
    columns = min(rank + max(8, rank // 4), operator.dim)
    eps = jnp.finfo(jnp.float32).eps
    start = init_basis(operator.dim, columns, key=key)

    def pair_residual(basis: EigenBasis) -> jax.Array:
        vectors, values = basis.vectors[:, :rank], basis.values[None, :rank]
        image = operator.matmat(vectors)
        largest = jnp.maximum(jnp.max(jnp.abs(image)), _TINY)
        error = (image - vectors * values) / largest
        norms = jnp.linalg.norm(image / largest, axis=0)
        return jnp.linalg.norm(error) / jnp.maximum(jnp.max(norms), _TINY)

    def unfinished(carry: tuple) -> jax.Array:
        _, ok, best, stalled, restarts = carry
        going = (best > 8 * eps) & (stalled < 10) & (restarts < max_restarts)
        return unbatched_max(going & ok) > 0

    def restart(carry: tuple) -> tuple:
        basis, _, best, stalled, restarts = carry
        basis, info = refresh_with_info(operator, basis, num_blocks=num_blocks)
        residual = pair_residual(basis)
        stalled = jnp.where(residual < 0.99 * best, 0, stalled + 1)
        return basis, info.ok, jnp.minimum(best, residual), stalled, restarts + 1

    with jax.default_matmul_precision("highest"):
        if num_blocks * columns >= operator.dim:
            basis, ok = _dense_eigenpairs(operator, columns)
        else:
            first = (
                start,
                jnp.array(True),
                jnp.float32(jnp.inf),
                jnp.int32(0),
                jnp.int32(0),
            )
            basis, ok, _, _, _ = jax.lax.while_loop(unfinished, restart, first)
    vectors = jnp.where(ok, basis.vectors, start.vectors)[:, :rank]
    values = jnp.where(ok, basis.values, jnp.nan)[:rank]
    return EigenBasis(vectors, values, operator.trace)
