"""Eigenspaces at work: the one place where `VVᵀ` is written."""

import jax
import jax.numpy as jnp

from dsbp_jax.linalg import EigenBasis


def energy_mask(basis: EigenBasis, energy: float | jax.Array) -> jax.Array:
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
    return (before < (energy - eps) * trace) | (trace <= 0)


def project_matrix(
    matrix: jax.Array,
    basis: EigenBasis,
    side: str,
    energy: float | jax.Array | None = None,
) -> jax.Array:
    """`VVᵀG` or `GVVᵀ` for a stack of matrices.

    Args:
      matrix: G, shape `(*batch, window, d_in, d_out)`, float32.
      basis: Of shape `(*batch, d, k)`, d by the side.
      side: `"input"` or `"output"`.
      energy: As `spectral_projection`.

    Returns:
      The projection, shaped like `matrix`.
    """
    v = basis.vectors
    kept = v
    if energy is not None:
        kept = jnp.where(energy_mask(basis, energy)[..., None, :], v, 0)
    *batch, window, d_in, d_out = matrix.shape
    if side == "output":
        # One thin product for all window taps: they are rows like the others.
        rows = matrix.reshape(*batch, window * d_in, d_out)
        return ((rows @ kept) @ jnp.swapaxes(v, -1, -2)).reshape(matrix.shape)
    if window == 1:
        matrix, squeezed = matrix[..., 0, :, :], matrix.shape
        return (v @ (jnp.swapaxes(kept, -1, -2) @ matrix)).reshape(squeezed)
    v, kept = v[..., None, :, :], kept[..., None, :, :]
    return v @ (jnp.swapaxes(kept, -1, -2) @ matrix)
