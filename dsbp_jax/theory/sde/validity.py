"""Where the expansion of an optimizer can hold, measured and said.

Both expansions have a number that must be small. In η it is `η‖J‖` of the drift's
Jacobian J: of linear drift `−λx` the modified equation sums to `log(1 − ηλ)/η`, a
series that ends at ηλ = 1. In ρ it is what the polynomial misses of the perturbed
gradient: from 1 on, it is further away than zero.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax.layers import is_traced
from dsbp_jax.theory.sde.equation import Equation

_POWER_STEPS = 12


class Validity(NamedTuple):
    """How far the expansion is from where it ends; 1 is the end.

    Attributes:
      stiffness: `η‖Jz‖/‖z‖` after a few power steps on the Jacobian J of the drift.
        # shape=(), the dtype of the params
      remainder: What the Taylor polynomial misses of the moves of the batches, their
        root mean square over that of the moves.  # shape=(), likewise
    """

    stiffness: jax.Array
    remainder: jax.Array


def validity(equation: Equation, params: optax.Params, batches: Any) -> Validity:
    """Measures both at one point.

    Args:
      equation: The equation.
      params: The point.
      batches: The batches that the optimizer draws from, on a leading axis.

    Returns:
      The two numbers.

    Example:
      >>> import dsbp_jax.theory.sde as sde
      >>> loss_fn = lambda w, x: 0.5 * x * w**2
      >>> equation = sde.modified_equation(loss_fn, sde.sgd(), 0.1)
      >>> found = validity(equation, jnp.array(1.0), jnp.array([1.0, 3.0]))
      >>> print(found.stiffness, found.remainder)
      0.2 0.0
    """

    def mean(params: optax.Params) -> optax.Updates:
        moves = jax.vmap(equation.expanded, (None, 0))(params, batches)
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), moves)

    def power_step(direction: Any, _: None) -> tuple[Any, jax.Array]:
        _, image = jax.jvp(mean, (params,), (direction,))
        norm = optax.tree.norm(image)
        safe = jnp.where(norm > 0, norm, 1)
        return jax.tree.map(lambda x: x / safe.astype(x.dtype), image), norm

    start = optax.tree.random_like(jax.random.key(0), params)
    length = optax.tree.norm(start)
    start = jax.tree.map(lambda x: x / length.astype(x.dtype), start)
    _, norms = jax.lax.scan(power_step, start, length=_POWER_STEPS)

    exact = jax.vmap(equation.exact, (None, 0))(params, batches)
    expanded = jax.vmap(equation.expanded, (None, 0))(params, batches)
    missed = optax.tree.norm(optax.tree.sub(exact, expanded))
    size = optax.tree.norm(exact)
    remainder = missed / jnp.where(size > 0, size, 1)
    return Validity(equation.learning_rate * norms[-1], remainder)


def require_valid(found: Validity, where: str) -> None:
    """Raises where an expansion cannot hold; traced numbers are taken on trust."""
    for text in _complaints(found):
        raise ValueError(f"{text} {where}; accepted is less than 1")


def warn_unless_valid(found: Validity, where: str) -> None:
    """Says where an expansion ceased to hold on the way."""
    for text in _complaints(found):
        warnings.warn(f"{text} {where}: no result to trust", stacklevel=3)


def _complaints(found: Validity) -> list[str]:
    if is_traced(found.stiffness):
        return []
    # NaN is no number below 1.
    wide, far = not found.stiffness < 1, not found.remainder < 1
    texts = {
        "learning_rate must be small beside the curvature, got η‖J‖ = "
        f"{found.stiffness:.3g}": wide,
        "rho must be small enough for the expansion, got one that misses "
        f"{found.remainder:.3g} of the perturbed gradient": far,
    }
    return [text for text, wrong in texts.items() if wrong]
