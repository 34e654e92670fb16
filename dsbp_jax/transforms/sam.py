"""Sharpness-aware minimisation as a gradient estimator.

The estimator has the signature of what it wraps, `(params, *args) -> (value,
grads)`, so it composes with any optimizer and costs one more evaluation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks

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
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(grads)]
        # Scaled by the largest entry: squares would lose 1e±30.
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(g)) for g in leaves])
        unit = jnp.where(largest > 0, largest, 1)
        norm = optax.tree.norm([leaf / unit for leaf in leaves])
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)

        def perturb(grad: jax.Array | None, param: Any) -> Any:
            if grad is None:  # not differentiated, such as a function in the tree
                return param
            step = scale * (grad.astype(jnp.float32) / unit)
            return param + step.astype(grad.dtype)

        is_none = lambda leaf: leaf is None
        perturbed = jax.tree.map(perturb, grads, params, is_leaf=is_none)
        _, grads = value_and_grad_fn(perturbed, *args, **kwargs)
        return value, grads

    return estimate
