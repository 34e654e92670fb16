"""The binary relative entropy and its inverse, which turns a budget into a bound."""

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from dsbp_jax import checks
from dsbp_jax.tracking import Number

# From above, where Newton's steps fall short of a convex function's root, never
# beyond it: each result is a bound, the last one to rounding.
_NEWTON_STEPS = 8


def binary_kl(q: Number, p: Number) -> jax.Array:
    """`kl(q‖p) = q log(q/p) + (1 − q) log((1 − q)/(1 − p))`, in nats.

    Args:
      q: In [0, 1].
      p: In [0, 1].

    Returns:
      At least 0; infinite where q is possible and p is not.

    Example:
      >>> print(binary_kl(0.5, 0.25).round(4))
      0.1438
    """
    q, p = jnp.asarray(q), jnp.asarray(p)
    q, p = q.astype(jnp.result_type(float)), p.astype(jnp.result_type(float))
    return xlogy(q, q) - xlogy(q, p) + xlogy(1 - q, 1 - q) - xlogy(1 - q, 1 - p)


def kl_inverse(q: Number, budget: Number) -> jax.Array:
    """The largest p with `kl(q‖p) ≤ c`, by Newton's steps.

    From `min(q + √(c/2), 1 − exp(−(c + h(q))/(1 − q)))`, h the entropy, which is
    at least the root (Pinsker; and `kl ≥ −h(q) − (1 − q)log(1 − p)`), the steps fall
    towards it and never below but for rounding.

    Args:
      q: In [0, 1].
      budget: c in nats, at least 0.

    Returns:
      p in [q, 1], differentiable by both: `∂p/∂c = p(1 − p)/(p − q)`.

    Raises:
      ValueError: An argument is out of its range.

    References:
      [P] Langford and Caruana, (Not) bounding the true error, 2001, for the use; [T]
      the start and the monotone steps. METHODS section 9.

    Example:
      >>> print(kl_inverse(0.1, 0.05).round(4))
      0.2201
      >>> kl_inverse(1.2, 0.05)
      Traceback (most recent call last):
      ...
      ValueError: q must be a number in [0, 1], got 1.2
    """
    checks.in_unit_interval("q", q)
    checks.non_negative("budget", budget)
    dtype = jnp.result_type(float)
    return _inverse(jnp.asarray(q).astype(dtype), jnp.asarray(budget).astype(dtype))


@jax.custom_jvp
def _inverse(q: jax.Array, budget: jax.Array) -> jax.Array:
    entropy = -xlogy(q, q) - xlogy(1 - q, 1 - q)
    below_one = jnp.where(q < 1, 1 - q, 1)
    start = -jnp.expm1(-(budget + entropy) / below_one)
    start = jnp.minimum(start, q + jnp.sqrt(budget / 2))
    start = jnp.where(q < 1, jnp.maximum(start, q), 1)

    def step(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = p * (1 - p)
        moves = (p > q) & (width > 0)
        excess = binary_kl(q, jnp.where(moves, p, 0.5)) - budget
        change = excess * jnp.where(moves, width, 0) / jnp.where(moves, p - q, 1)
        return jnp.clip(p - change, q, p), None

    p, _ = jax.lax.scan(step, start, length=_NEWTON_STEPS)
    return p


@_inverse.defjvp
def _inverse_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Of the root of `kl(q‖p) = c`, where there is one inside."""
    (q, budget), (dq, dc) = primals, tangents
    p = _inverse(q, budget)
    inside = (q < p) & (p < 1)
    safe_p = jnp.where(inside, p, 0.5)
    tiny = jnp.finfo(q.dtype).tiny
    safe_q = jnp.clip(jnp.where(inside, q, 0.25), tiny, 1)
    by_p = (safe_p - safe_q) / (safe_p * (1 - safe_p))
    by_q = jnp.log(safe_q / safe_p) - jnp.log((1 - safe_q) / (1 - safe_p))
    return p, jnp.where(inside, (dc - by_q * dq) / by_p, dq)
