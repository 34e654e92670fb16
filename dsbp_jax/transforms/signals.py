"""What a basis follows: the gradient's own covariance, or that of activations."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.layers import LayerActivations, MatrixView
from dsbp_jax.linalg import EigenBasis

SIDES = ("input", "output")


class Signal(NamedTuple):
    """The operator `gram(x, count=count, axis=axis)`, without its callables.

    Attributes:
      x: Shape `(*batch, ·, ·)`.
      count: What to divide by, shape `(*batch)`, float32.
      axis: The matrix axis that the operator acts on, 0 or 1; static.
    """

    x: jax.Array
    count: jax.Array  # type: ignore[assignment]
    axis: int


def gradient_signal(view: MatrixView, gradient: jax.Array, side: str) -> Signal:
    """GᵀG on the output side, GGᵀ on the input side, summed over window taps."""
    matrix = view.to_matrix(gradient)
    *batch, _, d_in, d_out = matrix.shape
    count = jnp.ones(batch, jnp.float32)
    if side == "output":
        return Signal(matrix.reshape(*batch, -1, d_out), count, axis=1)
    matrix = jnp.moveaxis(matrix, -3, -2)
    return Signal(matrix.reshape(*batch, d_in, -1), count, axis=0)


def activation_signal(
    activations: Mapping[str, LayerActivations],
    basis: EigenBasis,
    side: str,
    path: str,
) -> Signal:
    """The covariance of a layer's inputs or outputs, pooled over the kernel's uses.

    A kernel used again (`path#1`, …) adds its rows. A use in the other orientation,
    as of tied weights, has no rows in this space unless the widths happen to agree,
    and is left out.

    Args:
      activations: As captured, by path.
      basis: The basis that will follow, for its shape.
      side: `"input"` or `"output"`.
      path: Of the kernel's first use.

    Returns:
      The signal.

    Raises:
      ValueError: The first use has no such side, or rows of another shape.
    """
    *batch, dim, _ = basis.vectors.shape
    pooled, counts = [], []
    for use in range(len(activations)):
        name = f"{path}#{use}" if use else path
        if name not in activations:
            break
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
    return Signal(x, sum(counts[1:], start=counts[0]), axis=1)
