"""Decoupled weight decay of kernels that are folded every so many steps only."""

from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax import checks


def decay_since(
    schedule: Any, weight_decay: Any, first: int | jax.Array, last: int | jax.Array
) -> jax.Array:
    """What decoupled weight decay leaves of a kernel over some steps.

    Args:
      schedule: The learning rate, a number or a function of the step.
      weight_decay: The coefficient.
      first: The first step, counted from 0.
      last: The step before which it ends.

    Returns:
      `Π(1 − schedule(t)·weight_decay)` over `first ≤ t < last`, shape `()`, float32;
      0 where a step takes all.

    Example:
      >>> decay_since(lambda step: 0.1 * step, 1.0, 0, 3).round(3)
      Array(0.72, dtype=float32)
    """
    return jnp.exp(log_decay(schedule, weight_decay, first, last))


def log_decay(
    schedule: Any, weight_decay: Any, first: int | jax.Array, last: int | jax.Array
) -> jax.Array:
    """The logarithm of `decay_since`: also exact where a factor would round to 1."""
    rate = schedule if callable(schedule) else lambda step: schedule

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        share = jnp.minimum(rate(step) * weight_decay, 1)
        return total + jnp.log1p(-share).astype(jnp.float32)

    first, last = jnp.int32(first), jnp.int32(last)
    return jax.lax.fori_loop(first, last, add, jnp.float32(0))


def shrink_by(weight_decay: Any, steps: Any, shrink: Any) -> jax.Array | None:
    """The factor of folded kernels, None where there is none."""
    if not checks.is_static(weight_decay, 0):
        if steps is None:
            raise ValueError(
                "steps must be the number of steps since the last fold, because "
                f"weight_decay={weight_decay!r}, got None"
            )
        constant = (1 - weight_decay) ** checks.non_negative("steps", steps)
        shrink = constant if shrink is None else constant * shrink
    return None if shrink is None else jnp.asarray(shrink, jnp.float32)
