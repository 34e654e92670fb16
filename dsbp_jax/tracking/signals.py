"""What a basis follows: gradients, activations, or the rotation that a step makes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import linalg
from dsbp_jax.layers import LayerActivations, MatrixView, use_name
from dsbp_jax.tracking.eigenspace import Eigenspace


class Signal(NamedTuple):
    """A stack of operators, without their callables.

    Attributes:
      arrays: Of shape `(*batch, ·, ·)`, float32. Of what is followed outside of other
        columns the first has the shape `(*batch, d, ·)`.
      count: What to divide by, shape `(*batch)`, float32; or None.
      operator: Builds the operator of one matrix each, divided by a count if that is
        given; static.
    """

    arrays: tuple[jax.Array, ...]
    count: jax.Array | None  # type: ignore[assignment]
    operator: Callable[..., linalg.SymmetricOperator]


def _of_rows(
    x: jax.Array, count: jax.Array | None = None, *, axis: int = 1
) -> linalg.SymmetricOperator:
    return linalg.gram(x, count=1.0 if count is None else count, axis=axis)


def _of_columns(
    x: jax.Array, count: jax.Array | None = None
) -> linalg.SymmetricOperator:
    return _of_rows(x, count, axis=0)


def _of_product(
    a: jax.Array, b: jax.Array, count: jax.Array | None = None
) -> linalg.SymmetricOperator:
    del count
    return linalg.product_gram(a, b)


def _of_skew(
    g: jax.Array, w: jax.Array, count: jax.Array | None = None
) -> linalg.SymmetricOperator:
    del count
    return linalg.skew_gram(g, w)


def present(arrays: Sequence[jax.Array]) -> jax.Array:
    """Whether arrays `(*batch, ·, ·)` of a signal hold anything to follow; NaN is.

    Args:
      arrays: Those of a `Signal`.

    Returns:
      Shape `(*batch)`, bool.
    """
    # Rows that are not counted are zero. A largest entry compiles faster than an any.
    some = [jnp.max(jnp.abs(x), axis=(-2, -1)) != 0 for x in arrays]
    return functools.reduce(jnp.logical_and, some)


def as_rows(matrix: jax.Array, side: str) -> jax.Array:
    """Matrices `(*batch, window, d_in, d_out)` as `(*batch, d, ·)`, d by the side."""
    axis = -2 if side == "input" else -1
    rows = jnp.moveaxis(matrix, axis, -3)
    return rows.reshape(*rows.shape[:-2], -1)


def _float32(matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Matrices in float32, and what to divide their covariance by.

    Float64 holds scales that float32 cannot: these are divided by their largest entry,
    and eigenvalues end at 1e±30 times what they are then.
    """
    if matrix.dtype.itemsize <= 4:
        return matrix.astype(jnp.float32), None
    largest = jnp.max(jnp.abs(matrix), initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    count = jnp.clip(1 / jnp.clip(largest, 1e-100, 1e100) ** 2, 1e-30, 1e30)
    return (matrix / largest).astype(jnp.float32), count.astype(jnp.float32)


# Traced once for all leaves of a shape.
_static = functools.partial(jax.jit, static_argnames=("view", "side"))


def gradient_signal(view: MatrixView, gradient: jax.Array, side: str) -> Signal:
    """GᵀG on the output side, GGᵀ on the input side, summed over window taps."""
    rows, count = _gradient(gradient, view=view, side=side)
    return Signal((rows,), count, _of_rows if side == "output" else _of_columns)


def product_signal(
    inputs: jax.Array, outputs: jax.Array, kept: jax.Array | None = None
) -> Signal:
    """GGᵀ of a gradient `XᵀΔ` that is not formed, on the input side.

    Args:
      inputs: X, shape `(*batch, n, d_in)`.
      outputs: Δ, shape `(*batch, n, d_out)`.
      kept: M, of which `MᵀM` is added, shape `(*batch, m, d_in)`; or None.

    Returns:
      The signal.
    """
    rows = inputs.astype(jnp.float32)
    if kept is not None:
        rows = jnp.concatenate([rows, kept], axis=-2)
    return Signal((rows.mT, outputs.astype(jnp.float32)), None, _of_product)


@_static
def _gradient(
    gradient: jax.Array, *, view: MatrixView, side: str
) -> tuple[jax.Array, jax.Array | None]:
    matrix, count = _float32(view.to_matrix(gradient))
    if count is not None:
        count = jnp.broadcast_to(count, matrix.shape[:-3])
    if side == "output":
        return matrix.reshape(*matrix.shape[:-3], -1, matrix.shape[-1]), count
    return as_rows(matrix, side), count


def rotation_signal(
    view: MatrixView, gradient: jax.Array, kernel: jax.Array, side: str
) -> Signal:
    """AᵀA of the rotation that descends: `A = skew(GWᵀ)`, or `skew(GᵀW)` on outputs."""
    g, w = (_rows(leaf, view=view, side=side) for leaf in (gradient, kernel))
    return Signal((g, w), None, _of_skew)


@_static
def _rows(leaf: jax.Array, *, view: MatrixView, side: str) -> jax.Array:
    return as_rows(_float32(view.to_matrix(leaf))[0], side)


def activation_signal(
    activations: Mapping[str, LayerActivations],
    shape: Sequence[int],
    side: str,
    path: str,
) -> Signal:
    """The covariance of a layer's inputs or outputs, pooled over the kernel's uses.

    A kernel used again (`path#1`, …) adds its rows. A use in the other orientation,
    as of tied weights, is of other spaces and is left out.

    Args:
      activations: As captured, by path.
      shape: That of the leaf's side, `(*batch, d)`.
      side: `"input"` or `"output"`.
      path: Of the kernel's first use.

    Returns:
      The signal.

    Raises:
      ValueError: The first use has no such side, or rows of another shape.
    """
    *batch, dim = shape
    pooled, counts = [], []
    view = activations[path].view  # of all uses alike, under vmap too
    for use in range(len(activations)):
        name = use_name(path, use)
        if name not in activations:
            break
        if use and activations[name].view != view:
            continue
        rows, count = activations[name].rows(side)
        if rows.shape[:-2] == tuple(batch) and rows.shape[-1] == dim:
            pooled.append(rows)
            counts.append(count)
        elif not use:
            expected = ", ".join(str(n) for n in (*batch, "n", dim))
            raise ValueError(
                f"activations of {path!r} must have {side}s of shape ({expected}) to "
                f"fit the params, got {rows.shape}"
            )
    x = pooled[0] if len(pooled) == 1 else jnp.concatenate(pooled, axis=-2)
    x = x.astype(jnp.float32)
    return Signal((x,), sum(counts[1:], start=counts[0]), _of_rows)


def fits(
    activations: Mapping[str, LayerActivations], space: Eigenspace, path: str
) -> bool:
    """Whether a leaf is used as its shape alone suggests.

    Where activations do not say how it is used, a wrong shape of a plain matrix is
    somebody's mistake, and that of a stack one of the guess.
    """
    assert space.view is not None
    used = activations[path].known_view
    if used is not None:
        return used == space.view
    *batch, dim, _ = space.vectors.shape
    rows, _ = activations[path].rows(space.side)
    fitting = (*rows.shape[:-2], rows.shape[-1]) == (*batch, dim)
    return fitting or not space.view.batch_axes
