"""Kernels that are differentiated by thin variables.

With columns V of a kernel's input side, a loss as a function of `W + VS` at S = 0 has
the derivative `VᵀG` by S, of shape `(*batch, window, q, d_out)`, whatever the loss does
with the kernel. A layer's own product gives it as `(XV)ᵀΔ` (the backward rule itself is
`layers.Product.sketched`); any other use sees the kernel through `hold`. The projected
gradient is `V(VᵀG)`, one product per leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dsbp_jax.layers import Site, explicit_sharding


def zero(site: Site, kernel: Any, basis: jax.Array) -> jax.Array:
    """The thin variable of a kernel, at zero.

    Args:
      site: The kernel's first use.
      kernel: The kernel.
      basis: Its columns, shape `(*batch, d_in, q)`.

    Returns:
      Shape `(*batch, window, q, d_out)`, in the kernel's dtype; on meshes with
      Explicit axes sharded like the kernel along the axes that it keeps.
    """
    *batch, taps, _, d_out = site.view.matrix_shape(site.shape)
    sharding = explicit_sharding(kernel)
    if sharding is not None:
        spec = [*sharding.spec, *[None] * (len(site.shape) - len(sharding.spec))]
        out = site.view.output_axes
        # Several axes are one here, which need not be sharded as one.
        last = spec[out[0]] if len(out) == 1 else None
        spec = [*(spec[axis] for axis in site.view.batch_axes), None, None, last]
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    shape = (*batch, taps, basis.shape[-1], d_out)
    return jnp.zeros(shape, kernel.dtype, device=sharding)


def expand(site: Site, basis: jax.Array, thin: jax.Array, kernel: Any) -> jax.Array:
    """`VS`, laid out like the kernel.

    Args:
      site: The kernel's first use, whose precision it takes.
      basis: Shape `(*batch, d_in, q)`.
      thin: Shape `(*batch, window, q, d_out)`.
      kernel: The kernel, for its sharding.

    Returns:
      An array of the kernel's shape.
    """
    basis = basis.astype(thin.dtype)[..., None, :, :]
    matrix = jnp.matmul(basis, thin, precision=site.precision)
    change = site.view.from_matrix(matrix, site.shape)
    sharding = explicit_sharding(kernel)
    return change if sharding is None else jax.sharding.reshard(change, sharding)


def hold(site: Site, kernel: Any, basis: jax.Array, thin: jax.Array) -> jax.Array:
    """The kernel, with `V dS` as its derivative by the thin variable.

    Args:
      site: The kernel's first use.
      kernel: The kernel.
      basis: Shape `(*batch, d_in, q)`; a constant to every derivative.
      thin: Shape `(*batch, window, q, d_out)`; its value does not matter.

    Returns:
      The kernel itself.
    """

    @jax.custom_jvp
    def held(kernel: Any, basis: Any, thin: Any) -> jax.Array:
        return kernel

    def rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (kernel, basis, _), (change, _, dthin) = primals, tangents
        parts = [] if isinstance(change, SymbolicZero) else [change]
        if not isinstance(dthin, SymbolicZero):
            parts.append(expand(site, basis, dthin, kernel))
        zeros = parts or [jnp.zeros_like(kernel)]
        return kernel, sum(zeros[1:], start=zeros[0])

    held.defjvp(rule, symbolic_zeros=True)
    return held(jnp.asarray(kernel), basis, thin)
