"""Convolutions as matrix products over patches.

`vmap` over kernels turns a convolution into a grouped one, which a CPU runs an
order of magnitude slower than the same number of plain ones. A matrix product with
the patches of the input becomes a batched matrix product instead, and costs what
its arithmetic costs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.layers import primitives
from dsbp_jax.layers.product import Product


def convolve(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    """The response of a convolution, through a matrix product where that can be.

    Args:
      product: The equation of a site. Matrix products, and convolutions that dilate
        their input, run as they stand.
      x: Its input.
      w: Its kernel.

    Returns:
      The response; sums are in another order than the convolution's.
    """
    params = product.equation.params
    plain = product.site.kind != "convolution" or not is_product(product.equation)
    if plain or product.response is not None:
        return product(x, w)
    lhs, rhs, out = params["dimension_numbers"]
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    w = jnp.transpose(w, (*rhs[2:], rhs[1], rhs[0]))
    columns = patches(
        x,
        w.shape[:-2],
        strides=params["window_strides"],
        padding=params["padding"],
        dilation=params["rhs_dilation"],
    )
    rows = columns.reshape(-1, columns.shape[-1])
    y = jax.lax.dot_general(
        rows,
        w.reshape(-1, w.shape[-1]),
        (((1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    y = y.reshape(*columns.shape[:-1], w.shape[-1])
    # From (batch, *space, channels) to the equation's own axes.
    order = [0] * y.ndim
    for source, target in enumerate((out[0], *out[2:], out[1])):
        order[target] = source
    return jnp.transpose(y, order)


def is_product(convolution: primitives.Equation) -> bool:
    """Whether a convolution does not dilate its input, as a transposed one does."""
    return math.prod(convolution.params["lhs_dilation"]) == 1


def patches(
    x: jax.Array,
    window: tuple[int, ...],
    *,
    strides: tuple[int, ...],
    padding: Any,
    dilation: tuple[int, ...],
) -> jax.Array:
    """What a window sees at each of its positions.

    Args:
      x: Shape `(batch, *space, channels)`.
      window: Taps along each axis of space.
      strides: Steps between two positions.
      padding: Pairs of zeros before and after; negative numbers cut off.
      dilation: Steps between two taps.

    Returns:
      Shape `(batch, *positions, taps * channels)`, the channels of a tap together.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1)
      >>> seen = patches(x, (3,), strides=(2,), padding=((1, 1),), dilation=(1,))
      >>> print(seen[0])
      [[0. 0. 1.]
       [1. 2. 3.]]
    """
    taps = [
        range(0, size * step, step) for size, step in zip(window, dilation, strict=True)
    ]
    config, shape = [(0, 0, 0)], [x.shape[0]]
    counts = []
    for size, (low, high), stride, offsets in zip(
        x.shape[1:-1], padding, strides, taps, strict=True
    ):
        count = (size + low + high - 1 - offsets[-1]) // stride + 1
        # By stride and phase, so that no slice has a stride of its own.
        blocks = count + offsets[-1] // stride
        config.append((low, blocks * stride - size - low, 0))
        shape += [blocks, stride]
        counts.append(count)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
    x = x.reshape(*shape, x.shape[-1])
    seen = [x]
    for axis, (count, stride, offsets) in enumerate(
        zip(counts, strides, taps, strict=True), start=1
    ):
        # Of its blocks and phases, each tap leaves one axis of positions.
        seen = [
            jax.lax.index_in_dim(
                jax.lax.slice_in_dim(
                    part, offset // stride, offset // stride + count, axis=axis
                ),
                offset % stride,
                axis=axis + 1,
                keepdims=False,
            )
            for part in seen
            for offset in offsets
        ]
    return jnp.concatenate(seen, axis=-1)
