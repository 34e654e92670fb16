"""What one step of an optimizer does with a gradient, as theory needs it.

A step without memory is two maps: the direction in which the point is perturbed before
the gradient is taken, and the move that the gradient there becomes. Momentum would be
more state of the same equation, and refreshing bases a jump of it: here bases are
those of one moment and stay.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax

from dsbp_jax import checks
from dsbp_jax.tracking import Number, Spaces, SpectralFilter, labelled
from dsbp_jax.transforms import by_layer, projected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """A step: `w ← w − η·move(∇f(w + ρ·v))`, v along `ascent(∇f(w))`, `‖v‖ = 1`.

    Attributes:
      rho: ρ, at least 0.
      ascent: From a gradient to the direction of the perturbation, of any length; None
        where nothing is perturbed; static.
      move: From the gradient to the update over −η; static.
    """

    rho: Number
    ascent: Callable[[optax.Updates], optax.Updates] | None = dataclasses.field(
        metadata={"static": True}
    )
    move: Callable[[optax.Updates], optax.Updates] = dataclasses.field(
        metadata={"static": True}
    )

    def at(self, rho: Number) -> "Method":
        """The same with another ρ; of a method that perturbs nothing, itself."""
        checks.non_negative("rho", rho)
        if self.ascent is None:
            return self
        return dataclasses.replace(self, rho=rho)


def _same(grads: optax.Updates) -> optax.Updates:
    return grads


def sgd() -> Method:
    """Plain steps, `w ← w − ηg`.

    Example:
      >>> sgd().rho
      0.0
    """
    return Method(0.0, None, _same)


def sam(rho: Number) -> Method:
    """Sharpness-aware steps, `w ← w − η∇f(w + ρg/‖g‖)`.

    Args:
      rho: ρ, at least 0.

    Returns:
      The method.

    Raises:
      ValueError: `rho` is out of its range.

    References:
      [P] Foret et al., Sharpness-aware minimization, ICLR 2021.

    Example:
      >>> sam(0.05).rho
      0.05
    """
    return Method(checks.non_negative("rho", rho), _same, _same)


def dsbp(bases: Spaces, *, rho: Number = 0.0, residual: Number = 0.0) -> Method:
    """Projected steps, perturbed inside the eigenspaces where ρ > 0.

    With P the projection of each leaf: the move is `PG + κ(G − PG)`, the perturbation
    `ρPg/‖Pg‖`, as in `spectral_sam(dsbp(…), rho)` without momentum.

    Args:
      bases: Path to eigenspaces, as `dsbp_jax.eigenspaces` and
        `dsbp_jax.activation_bases` give them.
      rho: ρ, at least 0.
      residual: κ in [0, 1].

    Returns:
      The method.

    Raises:
      ValueError: An argument is out of its range, or at the first gradient, the bases
        do not fit.

    References:
      [P] Muthuraman, Dynamic spectral backpropagation, 2025, for κ = 0 and ρ = 0.
      METHODS sections 1 and 4.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_jax.linalg import EigenBasis
      >>> basis = EigenBasis(jnp.eye(3, 1), jnp.ones(1), jnp.ones(()))
      >>> method = dsbp({"w": basis}, residual=0.5)
      >>> print(method.move({"w": jnp.ones((3, 2))})["w"][:, 0])
      [1.  0.5 0.5]
    """
    checks.non_negative("rho", rho)
    checks.in_unit_interval("residual", residual)

    def inside(grads: optax.Updates) -> optax.Updates:
        return projected(grads, labelled("bases", bases, grads))

    def move(grads: optax.Updates) -> optax.Updates:
        return projected(grads, labelled("bases", bases, grads), residual)

    return Method(rho, None if checks.is_static(rho, 0) else inside, move)


def whitened(
    bases: Spaces,
    *,
    rho: Number = 0.0,
    power: Number = 0.5,
    residual: Number = 1.0,
    damping: Number = 0.01,
) -> Method:
    """Steps divided by a power of each layer's spectrum, perturbed as in `dsbp`.

    The move is `V(λ + γ)^(−s)VᵀG + κ(τ + γ)^(−s)(G − VVᵀG)` with the eigenvalues of
    the basis, τ their mean over the rest and γ the damping times the mean of all; its
    norm is left as it is.

    Args:
      bases: As in `dsbp`, one eigenspace a leaf.
      rho: ρ, at least 0.
      power: s.
      residual: κ in [0, 1].
      damping: γ over the mean eigenvalue, at least 0.

    Returns:
      The method.

    Raises:
      ValueError: An argument is out of its range, or at the first gradient, the bases
        do not fit.

    References:
      [P] Benzing, FOOF, 2022, for s = 1 and κ = 1. METHODS section 8.

    Example:
      >>> import jax.numpy as jnp
      >>> from dsbp_jax.linalg import EigenBasis
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> method = whitened({"w": basis}, damping=0.0)
      >>> print(method.move({"w": jnp.ones((2, 3))})["w"][:, 0])
      [0.5 1. ]
    """
    checks.non_negative("rho", rho)
    how = SpectralFilter(power, residual, damping, scale=None)

    def inside(grads: optax.Updates) -> optax.Updates:
        return projected(grads, labelled("bases", bases, grads))

    def move(grads: optax.Updates) -> optax.Updates:
        return by_layer(grads, labelled("bases", bases, grads), how)

    return Method(rho, None if checks.is_static(rho, 0) else inside, move)
