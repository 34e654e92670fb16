"""Sharpness-aware minimisation as a gradient estimator.

The estimator has the signature of what it wraps, `(params, *args) -> (value,
grads)`, so it composes with any optimizer and costs one more evaluation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax.transforms import checks

ValueAndGrad = Callable[..., tuple[Any, Any]]


def sam_value_and_grad(
    value_and_grad_fn: ValueAndGrad, rho: float | jax.Array, *, mode: str = "full"
) -> ValueAndGrad:
    """Takes the gradient at `w + ρ g/‖g‖`, the worst point nearby to first order.

    The norm is over all leaves together. Where the gradient is zero there is no
    perturbation.

    Args:
      value_and_grad_fn: As `jax.value_and_grad` returns it; with `has_aux=True`
        its value is a pair.
      rho: Radius ρ of the perturbation, at least 0.
      mode: `"full"` perturbs along the whole gradient.

    Returns:
      A function of the same arguments. The value (and aux) it returns are those at
      w, the gradient is that at the perturbed point.

    Raises:
      ValueError: `rho` is negative or not finite, or `mode` is unknown.

    References:
      Foret et al., Sharpness-aware minimization, ICLR 2021.

    Example:
      >>> import jax, dsbp_jax
      >>> loss_fn = lambda w: 0.5 * w**2
      >>> estimate = dsbp_jax.sam_value_and_grad(jax.value_and_grad(loss_fn), rho=0.5)
      >>> value, grad = estimate(1.0)
      >>> print(value, grad)
      0.5 1.5
    """
    checks.non_negative("rho", rho)
    checks.one_of("mode", mode, ("full",))

    def estimate(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, grads = value_and_grad_fn(params, *args, **kwargs)
        as_float32 = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
        norm = optax.tree.norm(as_float32)
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        perturbed = jax.tree.map(
            lambda p, g: p + (scale * g).astype(jnp.result_type(p)), params, as_float32
        )
        _, grads = value_and_grad_fn(perturbed, *args, **kwargs)
        return value, grads

    return estimate
