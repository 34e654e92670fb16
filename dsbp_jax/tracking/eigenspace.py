"""Eigenspaces: a basis with its label, and the one place where `VVᵀ` is written.

An `EigenBasis` is numbers: it knows neither the leaf whose axes it spans, nor the side,
nor whether it was ever solved. An `Eigenspace` does, so that whoever is handed one can
use it on a leaf without asking again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.layers import MatrixView
from dsbp_jax.linalg import EigenBasis

#: The sides of a kernel `(d_in, d_out)`, in the order of its axes.
SIDES = ("input", "output")

Number = float | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigenspace:
    """The leading eigenspace of a layer, on one side of one leaf.

    Leaves of less than float32 are computed in float32, float64 stays what it is;
    results have the leaf's dtype. All methods take a leaf in its own shape.

    Attributes:
      basis: The eigenpairs, vectors of shape `(*batch, d, k)`.
      solved: Whether they were ever solved for; a random start is not. Shape
        `(*batch)`, bool.
      view: How the leaf is a matrix; static. None where it is not known yet.
      side: `"input"` or `"output"`; static.
      source: What the basis follows: `"gradient"`, `"activation"` or `"rotation"`;
        `"given"` where it came without a label, `"columns"` inside of `backprop`;
        static.

    Example:
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> view = MatrixView((0,), (1,))
      >>> space = Eigenspace(basis, jnp.array(True), view, "output", "gradient")
      >>> print(space.project(jnp.ones((3, 2)))[0])
      [1. 0.]
    """

    basis: EigenBasis
    solved: jax.Array
    view: MatrixView | None = dataclasses.field(metadata={"static": True})
    side: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})

    @property
    def vectors(self) -> jax.Array:
        """Those of the basis, shape `(*batch, d, k)`, float32."""
        return self.basis.vectors

    @property
    def values(self) -> jax.Array:
        """Those of the basis, shape `(*batch, k)`, float32."""
        return self.basis.values

    @property
    def trace(self) -> jax.Array:
        """That of the basis, shape `(*batch)`, float32."""
        return self.basis.trace

    @property
    def rank(self) -> int:
        """The number k of columns."""
        return self.basis.vectors.shape[-1]

    def leading(self, rank: int) -> "Eigenspace":
        """The space of the first `rank` columns."""
        vectors, values, trace = self.basis
        cut = EigenBasis(vectors[..., :rank], values[..., :rank], trace)
        return dataclasses.replace(self, basis=cut)

    def coordinates(self, leaf: jax.Array) -> jax.Array:
        """`VᵀW` of shape `(*batch, window, k, d_out)`, or `WV` `(…, d_in, k)`."""
        with jax.default_matmul_precision("highest"):
            return self._down(self._matrix(leaf))

    def along(self, rows: jax.Array) -> jax.Array:
        """`XV` of what the layer meets on this side, `(*batch, n, d)`: `(…, n, k)`."""
        with jax.default_matmul_precision("highest"):
            return rows @ self.vectors.astype(rows.dtype)

    def lift(self, coordinates: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `coordinates` inside the space, shaped like a leaf."""
        with jax.default_matmul_precision("highest"):
            return self._leaf(self._up(coordinates), like)

    def project(
        self, leaf: jax.Array, residual: Number = 0.0, energy: Number | None = None
    ) -> jax.Array:
        """`G − (1 − κ)(G − PG)`; a leaf whose space was never solved as it is."""
        return project(leaf, (self,), residual, energy)

    def outside(self, leaf: jax.Array, energy: Number | None = None) -> jax.Array:
        """`G − PG`; a leaf whose space was never solved as it is."""
        matrix = self._matrix(leaf)
        with jax.default_matmul_precision("highest"):
            result = matrix - self._inside(matrix, energy)
        return self._leaf(self._if_solved(result, matrix), leaf)

    def weighted(self, leaf: jax.Array) -> jax.Array:
        """`VΛVᵀW` or `WVΛVᵀ`, in float32 or wider, shaped like the leaf."""
        matrix = self._matrix(leaf)
        with jax.default_matmul_precision("highest"):
            inside = self._up(self._scaled(self._down(matrix), self.values))
        return self._view.from_matrix(inside, leaf.shape)

    def filter(
        self,
        leaf: jax.Array,
        weigh: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """`V diag(head) VᵀW + tail·(W − VVᵀW)`, or the like on the output side.

        Args:
          leaf: W.
          weigh: Gives head `(*batch, k)` and tail `(*batch)` from the squared norms of
            W along the columns, `(*batch, k)`, and of all of W, `(*batch)`.
        """
        matrix = self._matrix(leaf)
        axes = (-3, -1) if self.side == "input" else (-3, -2)
        with jax.default_matmul_precision("highest"):
            thin = self._down(matrix)
            energies = jnp.sum(jnp.square(thin), axis=axes)
            total = jnp.sum(jnp.square(matrix), axis=(-3, -2, -1))
            head, tail = weigh(energies, total)
            inside = self._up(self._scaled(thin, head - tail[..., None]))
        return self._leaf(tail[..., None, None, None] * matrix + inside, leaf)

    def rotation_to(self, new: "Eigenspace") -> jax.Array:
        """`V'ᵀV`, from coordinates here to those in `new`, shape `(*batch, k', k)`."""
        return rotation(new.vectors, self.vectors)

    @property
    def _view(self) -> MatrixView:
        if self.view is None:
            raise ValueError("view must be known to use an eigenspace, got None")
        return self.view

    def _matrix(self, leaf: jax.Array) -> jax.Array:
        return self._view.to_matrix(leaf).astype(wide(leaf.dtype))

    def _leaf(self, matrix: jax.Array, like: jax.Array) -> jax.Array:
        return self._view.from_matrix(matrix, like.shape).astype(like.dtype)

    def _if_solved(self, result: jax.Array, matrix: jax.Array) -> jax.Array:
        # A random start says nothing about the layer.
        return jnp.where(self.solved[..., None, None, None], result, matrix)

    def _inside(self, matrix: jax.Array, energy: Number | None) -> jax.Array:
        kept = self.vectors
        if energy is not None:
            kept = jnp.where(energy_mask(self.basis, energy)[..., None, :], kept, 0)
        return self._up(self._down(matrix, kept))

    def _scaled(self, thin: jax.Array, factors: jax.Array) -> jax.Array:
        factors = factors.astype(thin.dtype)[..., None, None, :]
        return thin * (factors.mT if self.side == "input" else factors)

    def _down(self, matrix: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        """`VᵀM` or `MV` of matrices `(*batch, window, d_in, d_out)`."""
        v = (self.vectors if kept is None else kept).astype(matrix.dtype)
        *batch, window, d_in, d_out = matrix.shape
        if self.side == "output":
            # One thin product for all window taps: they are rows like the others.
            rows = matrix.reshape(*batch, window * d_in, d_out)
            return (rows @ v).reshape(*batch, window, d_in, v.shape[-1])
        if window == 1:
            return (v.mT @ matrix[..., 0, :, :])[..., None, :, :]
        return v[..., None, :, :].mT @ matrix

    def _up(self, thin: jax.Array) -> jax.Array:
        """`VT` or `TVᵀ`."""
        v = self.vectors.astype(thin.dtype)
        *batch, window, d_in, rank = thin.shape
        if self.side == "output":
            rows = thin.reshape(*batch, window * d_in, rank) @ v.mT
            return rows.reshape(*batch, window, d_in, v.shape[-2])
        if window == 1:
            return (v @ thin[..., 0, :, :])[..., None, :, :]
        return v[..., None, :, :] @ thin


def wide(*dtypes: Any) -> Any:
    """The dtype that leaves are computed in: float32, or their own where it is wider.

    Example:
      >>> wide(jnp.bfloat16), wide(jnp.complex64)
      (dtype('float32'), dtype('complex64'))
    """
    return common_dtype(jnp.float32, *dtypes)


def common_dtype(*dtypes: Any) -> Any:
    """The narrowest dtype that holds all of them; asked for, so never an error."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def rotation(new: jax.Array, old: jax.Array) -> jax.Array:
    """`V'ᵀV` of the vectors of two bases, `(*batch, d, k')` and `(*batch, d, k)`."""
    with jax.default_matmul_precision("highest"):
        return new.mT @ old


def project(
    leaf: jax.Array,
    spaces: Sequence[Eigenspace],
    residual: Number = 0.0,
    energy: Number | None = None,
) -> jax.Array:
    """`G − (1 − κ)(G − PG)`, P on one side or on both.

    Args:
      leaf: G.
      spaces: One or two, on different sides. One that fills its whole side projects
        nothing; while one was never solved, the leaf stays as it is.
      residual: κ, the share of the complement that is kept.
      energy: Use the leading columns with this share of the trace only.

    Returns:
      The projected leaf, dtype kept.
    """
    spaces = [space for space in spaces if space.rank < space.vectors.shape[-2]]
    if not spaces:
        return leaf
    matrix = inside = spaces[0]._matrix(leaf)
    with jax.default_matmul_precision("highest"):
        for space in spaces:
            inside = space._inside(inside, energy)
    if not checks.is_static(residual, 0):
        inside = matrix - (1 - in_dtype(residual, matrix.dtype)) * (matrix - inside)
    for space in spaces:
        inside = space._if_solved(inside, matrix)
    return spaces[0]._leaf(inside, leaf)


def to_coordinates(leaf: jax.Array, spaces: Sequence[Eigenspace]) -> jax.Array:
    """`VᵀW`, `WV` or `VᵀWU`, without an axis for window taps where there are none.

    Args:
      leaf: W.
      spaces: One or two, on different sides; none gives the leaf as it is.

    Returns:
      Shape `(*batch, [window,] k, d_out)`, `(…, d_in, k)` or `(…, k, k)`, float32 or
      wider.
    """
    if not spaces:
        return leaf
    matrix = spaces[0]._matrix(leaf)
    with jax.default_matmul_precision("highest"):
        for space in spaces:
            matrix = space._down(matrix)
    return matrix.squeeze(-3) if matrix.shape[-3] == 1 else matrix


def from_coordinates(
    thin: jax.Array, spaces: Sequence[Eigenspace], like: jax.Array
) -> jax.Array:
    """The inverse of `to_coordinates` inside the spaces, as matrices.

    Args:
      thin: Coordinates.
      spaces: As there.
      like: A leaf of that shape.

    Returns:
      Shape `(*batch, window, d_in, d_out)`, the dtype of `thin`.
    """
    if thin.ndim < len(spaces[0]._view.matrix_shape(like.shape)):
        thin = jnp.expand_dims(thin, -3)
    with jax.default_matmul_precision("highest"):
        for space in spaces:
            thin = space._up(thin)
    return thin


def in_dtype(number: Number, dtype: Any) -> Any:
    """A hyperparameter as it enters a computation: arrays in its dtype, not their own.

    Example:
      >>> in_dtype(0.5, jnp.float32), in_dtype(jnp.bfloat16(0.5), jnp.float32).dtype
      (0.5, dtype('float32'))
    """
    is_array = hasattr(number, "astype")
    return jnp.asarray(number).astype(dtype) if is_array else number


def energy_mask(basis: EigenBasis, energy: Number) -> jax.Array:
    """Marks the leading columns that hold a share of the trace.

    Args:
      basis: Of k columns.
      energy: The share p in (0, 1].

    Returns:
      Shape `(…, k)`, bool: the smallest number of leading columns with
      `Σλ ≥ p·trace`, all of them where k columns hold less.

    Example:
      >>> basis = EigenBasis(jnp.eye(3), jnp.array([6.0, 3.0, 1.0]), jnp.array(10.0))
      >>> print(energy_mask(basis, 0.9))
      [ True  True False]
    """
    values = jnp.maximum(basis.values, 0)
    before = jnp.cumsum(values, axis=-1) - values
    # A column is needed while those before it fall short, up to rounding.
    eps = values.shape[-1] * jnp.finfo(values.dtype).eps
    trace = basis.trace[..., None]
    share = in_dtype(energy, values.dtype) - eps
    return (before < share * trace) | (trace <= 0)
