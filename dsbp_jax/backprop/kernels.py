"""`W = W₀ + VS`, written here only: the sum, in blocks, and its rounding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.layers import MatrixView
from dsbp_jax.tracking import wide

_BLOCK = 2**20  # numbers that are added to a kernel at once


def with_taps(coordinate: jax.Array, basis: jax.Array) -> jax.Array:
    """S with an axis for window taps, `(*batch, window, k, d_out)`."""
    if coordinate.ndim > basis.ndim:
        return coordinate
    return jnp.expand_dims(coordinate, -3)


@functools.partial(jax.jit, static_argnames=("view", "narrow"))
def kernel_sum(
    kernel: jax.Array,
    coordinate: jax.Array,
    basis: jax.Array,
    view: MatrixView,
    narrow: bool = True,
    offset: jax.Array | int = 0,
) -> jax.Array:
    """`W₀ + VS` in the kernel's dtype, or in float32 or wider; see `frame`."""
    thin = with_taps(coordinate, basis)
    basis = basis[..., None, :, :].astype(thin.dtype)
    dtype = kernel.dtype if narrow else wide(kernel.dtype, thin.dtype)

    def add(matrix: jax.Array, basis: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            change = basis @ thin
        common = wide(matrix.dtype, change.dtype)
        return (matrix.astype(common) + change.astype(common)).astype(dtype)

    matrix = view.to_matrix(kernel)
    blocks = _blocks(matrix)
    if blocks == 1 or dtype != kernel.dtype:
        return view.from_matrix(add(matrix, basis), kernel.shape)
    size = matrix.shape[-2] // blocks

    def block(index: jax.Array, matrix: jax.Array) -> jax.Array:
        at = index * size + offset
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, size, x.ndim - 2)
        new = add(cut(matrix), cut(basis))
        return jax.lax.dynamic_update_slice_in_dim(matrix, new, at, matrix.ndim - 2)

    matrix = jax.lax.fori_loop(0, blocks, block, matrix)
    return view.from_matrix(matrix, kernel.shape)


def _blocks(matrix: jax.Array) -> int:
    """In how many blocks of rows a product is added to a matrix.

    On a CPU it is formed before it is added, and all those of a program before any of
    them: in blocks it needs no room. Where arrays may be cut over devices a loop over
    their rows would gather them.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    rows = matrix.shape[-2]
    wanted = -(-matrix.size // _BLOCK)
    return next((n for n in range(wanted, 4 * wanted) if rows % n == 0), 1)


def rounded(
    whole: jax.Array,
    dtype: Any,
    basis: jax.Array,
    view: MatrixView,
    draw: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """A kernel in a narrow dtype, and what that leaves over, `(*batch, window, k, ·)`.

    What the columns cannot hold of the rest is rounded stochastically, which keeps it
    in the mean.
    """
    nearest = whole.astype(dtype).astype(whole.dtype)
    basis = basis.astype(whole.dtype)[..., None, :, :]
    with jax.default_matmul_precision("highest"):
        rest = view.to_matrix(whole - nearest)
        inside = basis.mT @ rest
        outside = rest - basis @ inside
    wanted = nearest + view.from_matrix(outside, whole.shape)
    lower = wanted.astype(dtype)
    error = wanted - lower.astype(whole.dtype)
    towards = jnp.copysign(jnp.array(jnp.inf, dtype), error.astype(dtype))
    other = jnp.nextafter(lower, towards)
    gap = jnp.abs(other.astype(whole.dtype) - lower.astype(whole.dtype))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), draw[0]), draw[1])
    chosen = jax.random.uniform(key, whole.shape, whole.dtype) * gap < jnp.abs(error)
    return jnp.where(chosen, other, lower), inside
