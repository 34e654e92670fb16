"""Spectral filters: a power of a covariance, applied to a leaf through few eigenpairs.

With the leading eigenpairs (V, λ) of a covariance C of q eigenvalues, the filter is

    O = V(λ + γ)^(−s)VᵀU + κ(τ + γ)^(−s)(U − VVᵀU),   τ = (tr C − Σλ)/(q − k),

`power` s, `residual` κ, γ = `damping`·tr C/q. All is computed for `C/tr C`, whatever
the scale of U.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks, linalg
from dsbp_jax.tracking.eigenspace import Number, in_dtype

#: What the norm of a filtered leaf can be made.
SCALES = ("spectral", "rms", "update", None)

# Of a sum of shares that is 1, rounding leaves so many eps.
_ROUNDING = 8


@dataclasses.dataclass(frozen=True)
class SpectralFilter:
    """What is done with each eigenvalue, and what norm the result has.

    Attributes:
      power: s; ½ of an update's own covariance makes all singular values alike.
      residual: κ, the weight of the complement.
      damping: γ in units of the mean eigenvalue.
      scale: One of `SCALES`; static.
    """

    power: Number = 0.5
    residual: Number = 1.0
    damping: Number = 0.01
    scale: str | None = "spectral"

    def __post_init__(self) -> None:
        """Checks every value."""
        checks.finite("power", self.power)
        checks.in_unit_interval("residual", self.residual)
        checks.non_negative("damping", self.damping)
        if self.scale not in SCALES:
            names = ", ".join(map(repr, SCALES))
            raise ValueError(f"scale must be one of {names}, got {self.scale!r}")

    @property
    def is_identity(self) -> bool:
        """Whether it is known to change nothing."""
        flat = checks.is_static(self.power, 0) and checks.is_static(self.residual, 1)
        return flat and self.scale is None

    def factors(self, values: jax.Array, rest: jax.Array, count: int) -> "Factors":
        """What the filter multiplies by.

        Args:
          values: Eigenvalues λ over the trace, shape `(…, k)`.
          rest: What is left of the trace, over it, shape `(…)`.
          count: How many eigenvalues there are in all, q.

        Returns:
          The factors.
        """
        dtype, eps = values.dtype, jnp.finfo(values.dtype).eps
        rest = jnp.where(rest > _ROUNDING * eps, rest, 0)
        tau = rest / max(count - values.shape[-1], 1)
        gamma = in_dtype(self.damping, dtype) / count
        tail = in_dtype(self.residual, dtype) * self._of(tau + gamma)
        own = self._of(values + gamma)
        head = jnp.where(values > eps, own, tail[..., None])
        return Factors(head, tail)

    def _of(self, values: jax.Array) -> jax.Array:
        """`x^(−s)`; a direction that is not there has no inverse."""
        power = jnp.asarray(self.power, values.dtype)
        there = values > 0
        inverse = jnp.where(there, values, 1) ** -power
        return jnp.where(there, inverse, (power == 0).astype(values.dtype))

    def strength(
        self,
        factors: "Factors",
        inside: jax.Array,
        trace: jax.Array,
        unit: jax.Array,
        shape: tuple[int, ...],
        size: tuple[int, int] | None = None,
    ) -> jax.Array:
        """What the factors are to be multiplied by, for the result to have its norm.

        Args:
          factors: Those of eigenvalues over their trace.
          inside: Squared norms of U along the leading directions over that of all of
            U, shape `(…, k)`.
          trace: The squared norm of U, shape `(…)`.
          unit: The trace that eigenvalues were divided by, shape `(…)`.
          shape: That of each matrix, `(a, b)`.
          size: That of the kernels of which the matrices are coordinates: the norm is
            that of a kernel's update with so few singular values.

        Returns:
          Shape `(…)`; zero where U is.
        """
        safe = lambda x: jnp.where(x > 0, x, 1)
        if self.scale is None:
            return jnp.where(
                unit > 0, safe(unit) ** -in_dtype(self.power, unit.dtype), 0
            )
        rest = jnp.maximum(1 - jnp.sum(inside, axis=-1), 0)
        square = jnp.sum(factors.head**2 * inside, axis=-1) + factors.tail**2 * rest
        a, b = shape if size is None else size
        norm: jax.Array | float = jnp.sqrt(safe(trace))
        if self.scale != "update":
            each = math.sqrt(max(1, b / a))
            if self.scale == "rms":
                each = 0.2 * math.sqrt(max(a, b))
            norm = each * math.sqrt(min(*shape, a, b))
        some = (trace > 0) & (square > 0)
        by = jnp.sqrt(safe(trace)) * jnp.sqrt(safe(square))
        return jnp.where(some, norm / by, 0)


class Factors(NamedTuple):
    """What a filter multiplies by.

    Attributes:
      head: The parts along the leading eigenvectors, shape `(…, k)`.
      tail: All the rest, shape `(…)`.
    """

    head: jax.Array
    tail: jax.Array


def nearly_diagonal(
    gram: jax.Array, rest: jax.Array, how: SpectralFilter, count: int
) -> tuple[Factors, jax.Array]:
    """A filter's matrix function of a small matrix that is diagonal but for rounding.

    What is off the diagonal enters to first order, so that the function also has the
    derivatives of the matrix function, in all directions.

    Args:
      gram: Symmetric, over the trace of the covariance, shape `(…, k, k)`.
      rest: What is left of the trace, over it, shape `(…)`.
      how: The filter f.
      count: How many eigenvalues the covariance has, q.

    Returns:
      The factors of its diagonal, and `f(gram)`, shape `(…, k, k)`.

    References:
      [P] Daleckii and Krein, 1965, for the derivative of a matrix function.
    """
    values = jnp.diagonal(gram, axis1=-2, axis2=-1)
    factors = how.factors(values, rest, count)
    eps = jnp.finfo(values.dtype).eps
    power = jnp.asarray(how.power, values.dtype)
    damped = values + in_dtype(how.damping, values.dtype) / count
    logs = jnp.log(jnp.where(values > eps, damped, 1))
    # (f(x) − f(y))/(x − y), also where x and y are close.
    half = (logs[..., :, None] - logs[..., None, :]) / 2
    mean = (logs[..., :, None] + logs[..., None, :]) / 2
    near = jnp.abs(half) < 1e-3
    apart = jnp.where(near, 1, half)
    ratio = jnp.sinh(power * apart) / jnp.sinh(apart)
    slope = -jnp.exp(-(power + 1) * mean) * jnp.where(near, power, ratio)
    both = (values > eps)[..., :, None] & (values > eps)[..., None, :]
    eye = jnp.eye(values.shape[-1], dtype=values.dtype)
    off = jnp.where(both & (eye == 0), gram * slope, 0)
    return factors, off + factors.head[..., None, :] * eye


def whole_space(
    unit: jax.Array, how: SpectralFilter, count: int
) -> tuple[jax.Array, Factors, jax.Array]:
    """A filter's matrix function of a covariance that is known whole.

    The product of X with itself loses what is small in it: eigenvectors come out
    mixed by rounding over the *largest* eigenvalue. In the basis that they give, the
    product is formed again, where each entry is as good as its row and column. To
    derivatives that basis is a constant, without which theirs are none the less right.

    Args:
      unit: X over its norm, shape `(…, n, q)`.
      how: The filter f.
      count: q.

    Returns:
      Eigenvalues of `XᵀX`, shape `(…, q)`, their factors, and `f(XᵀX)`, shape
      `(…, q, q)`.
    """
    with jax.default_matmul_precision("highest"):
        _, rotation = linalg.principal(jax.lax.stop_gradient(unit))
        thin = unit @ rotation
        gram = thin.mT @ thin
        values = jnp.diagonal(gram, axis1=-2, axis2=-1)
        factors, function = nearly_diagonal(
            gram, jnp.zeros_like(values[..., 0]), how, count
        )
        return values, factors, rotation @ function @ rotation.mT
