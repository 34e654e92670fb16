"""Spike-plus-flat models of a distribution, and the map that moves one onto another.

A model is a mean, the leading eigenpairs of a covariance, and one value for all other
directions. It is cheap to keep up to date (`absorb`), and between two of them the map
that carries mean and covariance over is known in closed form (`transport`): it differs
from a multiple of the identity in the span of the two bases only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from dsbp_jax.linalg.basis import EigenBasis, ascending_eigenpairs, refresh_basis
from dsbp_jax.linalg.operators import SymmetricOperator
from dsbp_jax.linalg.orthogonal import extend_basis

_TINY = 1e-30
_FLOOR = 1e-6  # of the mean variance: what is below it is no variance


class Spiked(NamedTuple):
    """Mean and covariance `VΛVᵀ + τ(I − VVᵀ)`, `τ = (trace − Σλ)/(d − k)`.

    Attributes:
      mean: Shape `(d,)`, float32.
      basis: The leading eigenpairs of the covariance, vectors `(d, k)`.
    """

    mean: jax.Array
    basis: EigenBasis


class Transport(NamedTuple):
    """The map `x ↦ x + (mean' − mean) + (A − I)(x − mean)`, A symmetric.

    `A = tail·(I − QQᵀ) + QMQᵀ`.

    Attributes:
      source: The mean that rows are moved to, shape `(d,)`.
      target: The mean that they have, shape `(d,)`.
      columns: Q, orthonormal, shape `(d, m)`.
      inner: M, shape `(m, m)`.
      tail: Shape `()`.
    """

    source: jax.Array
    target: jax.Array
    columns: jax.Array
    inner: jax.Array
    tail: jax.Array

    def __call__(self, rows: jax.Array) -> jax.Array:
        """Rows `(n, d)`, moved; computed in float32, in the dtype that they have."""
        wide = rows.astype(jnp.float32)
        if self.columns.shape[0] == self.columns.shape[1]:
            moved = wide @ self.matrix
        else:
            inside = (wide @ self.columns) @ self._change
            moved = self.tail * wide + inside @ self.columns.T
        return (moved + self.offset).astype(rows.dtype)

    @property
    def matrix(self) -> jax.Array:
        """A, shape `(d, d)`."""
        identity = jnp.eye(len(self.columns), dtype=jnp.float32)
        thick = self.columns @ self._change @ self.columns.T
        return self.tail * identity + thick

    @property
    def offset(self) -> jax.Array:
        """What is added to `xA`, shape `(d,)`."""
        inside = (self.target @ self.columns) @ self._change
        return self.source - self.tail * self.target - inside @ self.columns.T

    @property
    def _change(self) -> jax.Array:
        return self.inner - self.tail * jnp.eye(len(self.inner), dtype=jnp.float32)


def tail(basis: EigenBasis) -> jax.Array:
    """τ, the variance of every direction outside of a basis; 0 where there is none.

    Example:
      >>> tail(EigenBasis(jnp.eye(4, 2), jnp.array([4.0, 2.0]), jnp.array(7.0)))
      Array(0.5, dtype=float32)
    """
    dim, rank = basis.vectors.shape
    rest = basis.trace - jnp.sum(basis.values)
    return jnp.maximum(rest, 0) / max(dim - rank, 1) * float(dim > rank)


def _covariance(
    model: Spiked,
    shift: jax.Array,
    centred: jax.Array,
    old: jax.Array,
    new: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """What `absorb` decomposes, times a block v."""
    vectors, values, _ = model.basis
    flat = tail(model.basis)
    inside = vectors.T @ v
    carried = flat * v + vectors @ ((values - flat)[:, None] * inside)
    carried = carried + shift[:, None] * (shift @ v)
    return old * carried + new * (centred.T @ (centred @ v))


def absorb(model: Spiked, rows: jax.Array, weight: jax.Array) -> Spiked:
    """The model of a mixture of what was modelled and of some rows.

    Its basis is refreshed once (`refresh_basis`).

    Args:
      model: What was modelled.
      rows: Shape `(n, d)`, any floating dtype; read as float32.
      weight: Of the rows, in [0, 1]; the model has the rest.

    Returns:
      The model of the mixture. Rows that are not finite leave it as it was.

    References:
      [T] Mean and covariance of a mixture; [O] one refresh: METHODS section 11.

    Example:
      >>> start = EigenBasis(jnp.eye(2, 1), jnp.ones(1), jnp.array(2.0))
      >>> rows = jnp.array([[1.0, 3.0], [1.0, -3.0]])
      >>> model = absorb(Spiked(jnp.zeros(2), start), rows, jnp.array(1.0))
      >>> print(model.mean, model.basis.values)
      [1. 0.] [9.]
    """
    with jax.default_matmul_precision("highest"):
        rows = rows.astype(jnp.float32)
        middle = jnp.mean(rows, axis=0)
        centred = rows - middle
        mean = (1 - weight) * model.mean + weight * middle
        shift = jnp.sqrt(weight) * (middle - model.mean)
        trace = (1 - weight) * (model.basis.trace + shift @ shift)
        trace = trace + weight * jnp.sum(jnp.square(centred)) / len(rows)
        operator = SymmetricOperator(
            Partial(_covariance, model, shift, centred, 1 - weight, weight / len(rows)),
            rows.shape[1],
            trace,
        )
        mixed = Spiked(mean, refresh_basis(operator, model.basis))
        sound = jnp.isfinite(trace + jnp.sum(mean) + jnp.sum(mixed.basis.values))
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), mixed, model)


def transport(source: Spiked, target: Spiked, limit: float = 10.0) -> Transport:
    """The linear map of least cost from one model's distribution to another's.

    With Q an orthonormal basis of both spans, `S = QᵀC_sQ` and `T = QᵀC_tQ`,

        M = S^½(S^½TS^½)^(−½)S^½,   A = √(τ_s/τ_t)(I − QQᵀ) + QMQᵀ,

    so that `A C_t A = C_s`, and `A = I` where both are the same.

    Args:
      source: Where rows are moved to.
      target: Where they come from.
      limit: No direction is stretched or shrunk by more.

    Returns:
      The map.

    References:
      [P] The optimal map between Gaussians: Gelbrich, 1990; [O] of two spike-plus-flat
      models, with limits: METHODS section 11.

    Example:
      >>> of = lambda a: EigenBasis(jnp.eye(3, 1), jnp.array([a]), jnp.array(a + 2.0))
      >>> source, target = Spiked(jnp.ones(3), of(16.0)), Spiked(jnp.zeros(3), of(4.0))
      >>> print(transport(source, target)(jnp.eye(3)[:2]))
      [[3. 1. 1.]
       [1. 2. 1.]]
    """
    with jax.default_matmul_precision("highest"):
        left, right = source.basis, target.basis
        dim, rank = left.vectors.shape
        if 2 * rank >= dim:
            q = jnp.eye(dim, dtype=jnp.float32)
        else:
            inside = left.vectors.T @ right.vectors
            outside = right.vectors - left.vectors @ inside
            q = jnp.concatenate(
                [left.vectors, extend_basis(left.vectors, outside)], axis=1
            )
        floor = _FLOOR * left.trace / dim + _TINY
        flats = [jnp.maximum(tail(basis), floor) for basis in (left, right)]
        s, t = (
            _inside(q, basis, flat, floor)
            for basis, flat in zip((left, right), flats, strict=True)
        )
        root = _function(s, lambda x: jnp.sqrt(jnp.maximum(x, floor)))
        middle = _function(
            root @ t @ root, lambda x: jax.lax.rsqrt(jnp.maximum(x, floor**2))
        )
        bound = lambda x: jnp.clip(x, 1 / limit, limit)
        inner = _function(root @ middle @ root, bound)
        stretch = bound(jnp.sqrt(flats[0] / flats[1]))
        return Transport(source.mean, target.mean, q, inner, stretch)


def _inside(
    q: jax.Array, basis: EigenBasis, flat: jax.Array, floor: jax.Array
) -> jax.Array:
    """`QᵀCQ`."""
    thin = q.T @ basis.vectors
    over = jnp.maximum(basis.values, floor) - flat
    return (thin * over) @ thin.T + flat * jnp.eye(q.shape[1], dtype=jnp.float32)


def _function(c: jax.Array, f: object) -> jax.Array:
    """`f(C)` of a symmetric matrix."""
    values, vectors = ascending_eigenpairs(0.5 * (c + c.T))
    return (vectors * f(values)) @ vectors.T  # type: ignore[operator]
