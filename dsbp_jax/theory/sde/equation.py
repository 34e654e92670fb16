"""Drift and diffusion of an optimizer, to a chosen order in the SAM radius.

The optimizer draws one of n batches in each step, all alike, so its noise is known: it
is that of n moves γᵢ(w). Their mean is the drift, and their deviations are themselves a
factor of the covariance, `Σ = (1/n)Σᵢδᵢδᵢᵀ`: n Brownian motions drive the equation, and
no covariance is formed or factored. Everything is a gradient, or a derivative of one
along a direction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.theory.sde.methods import Method
from dsbp_jax.tracking import common_dtype

#: Powers of ρ that an expansion may keep.
MAX_ORDER = 3


class Equation(NamedTuple):
    """`dX = b(X)dt + √η Σ(X)^½dW` in units of time in which a step takes η.

    Attributes:
      exact: `(params, batch) -> γ`, the move of the optimizer on one batch, over −η.
      expanded: The same, by its Taylor polynomial in ρ.
      drift: `(params, batches) -> b`, a tree like the params.
      diffusion: `(params, batches) -> √η·δ/√n`, leaves `(n, *shape)`: one column for
        each of n Brownian motions.
      stratonovich: `(params, batches) -> b − ½Σ_k(∂σ_k)σ_k`, the drift of the same
        process in Stratonovich's sense.
      learning_rate: η.
      order: Of the polynomial.
    """

    exact: Callable[..., Any]
    expanded: Callable[..., Any]
    drift: Callable[..., Any]
    diffusion: Callable[..., Any]
    stratonovich: Callable[..., Any]
    learning_rate: float
    order: int


def modified_equation(
    loss_fn: Callable[..., jax.Array],
    method: Method,
    learning_rate: float,
    *,
    order: int = 3,
    correction: bool = True,
) -> Equation:
    """The equation whose law is close to that of an optimizer with small steps.

    With g = ∇fᵢ the gradient of batch i, M the method's move and v its perturbation,
    a constant of the derivatives:

        γᵢ = M(∇fᵢ(w + ρv)) ≈ Σ_{j ≤ order} ρʲ/j! ∂ʲ/∂tʲ M(∇fᵢ(w + tv))|_{t=0}
           = M(g + ρ∇²fᵢv + ½ρ²∇³fᵢ(v, v) + ⅙ρ³∇⁴fᵢ(v, v, v))   for linear M
        b  = −E[γ] − ½η(∂E[γ])E[γ]  with the correction, −E[γ] without
        Σ  = Cov[γ]

    The rest of the polynomial is O(ρ^(order + 1)). In η the law is that of the
    optimizer to weak order 1 without the correction and 2 with it, both up to the rest
    in ρ: with ρ = c√η, order 3 and the correction give weak order 2.

    Args:
      loss_fn: `(params, batch) -> ` scalar.
      method: What a step does.
      learning_rate: η, above 0.
      order: Powers of ρ that are kept, 0 to 3. Each doubles the work.
      correction: Whether to keep the term in η.

    Returns:
      The equation. Its functions take batches as a tree whose leaves have one axis in
      front, of the n batches that the optimizer draws from.

    Raises:
      ValueError: An argument is out of its range, or when used, the loss is no scalar.

    References:
      [P] Li, Tai and E, Stochastic modified equations, 2017 and 2019, for SGD (order
      0, both forms); [O] the expansion to third order in ρ and of filtered moves; to
      first order it is that of [P] Compagnoni et al., An SDE for modeling SAM, 2023.
      METHODS section 9.

    Example:
      >>> import dsbp_jax.theory.sde as sde
      >>> loss_fn = lambda w, x: 0.5 * x * w**2
      >>> equation = modified_equation(loss_fn, sde.sam(0.5), 0.1, correction=False)
      >>> print(equation.drift(jnp.array(2.0), jnp.array([1.0, 3.0])))
      -5.0
    """
    checks.positive("learning_rate", learning_rate)
    order = checks.positive_int("order", order, 0, MAX_ORDER)

    def loss(params: optax.Params, batch: Any) -> jax.Array:
        return checks.scalar_loss(loss_fn(params, batch))

    gradient = jax.grad(loss)

    def along_the_perturbation(
        params: optax.Params, batch: Any
    ) -> Callable[[jax.Array], optax.Updates]:
        """`t ↦ M(∇f(w + tv))`."""
        ascent = _unit(method.ascent(gradient(params, batch)))

        def at(distance: jax.Array) -> optax.Updates:
            moved = jax.tree.map(
                lambda w, v: w + distance.astype(w.dtype) * v, params, ascent
            )
            return method.move(gradient(moved, batch))

        return at

    def exact(params: optax.Params, batch: Any) -> optax.Updates:
        if checks.is_static(method.rho, 0):
            return method.move(gradient(params, batch))
        at = along_the_perturbation(params, batch)
        return at(jnp.asarray(method.rho, _dtype(params)))

    def expanded(params: optax.Params, batch: Any) -> optax.Updates:
        if checks.is_static(method.rho, 0):
            return exact(params, batch)
        at = along_the_perturbation(params, batch)
        derivatives: Callable[[jax.Array], tuple[Any, ...]] = lambda t: (at(t),)
        for _ in range(order):
            derivatives = _with_next(derivatives)
        total, *others = derivatives(jnp.zeros((), _dtype(params)))
        factor = 1.0
        for power, term in enumerate(others, 1):
            factor = factor * method.rho / power
            total = _add(total, factor, term)
        return total

    def moves(params: optax.Params, batches: Any) -> optax.Updates:
        return jax.vmap(expanded, (None, 0))(params, batches)

    def minus_mean(params: optax.Params, batches: Any) -> optax.Updates:
        return jax.tree.map(lambda g: -jnp.mean(g, axis=0), moves(params, batches))

    def drift(params: optax.Params, batches: Any) -> optax.Updates:
        first = minus_mean(params, batches)
        if not correction:
            return first
        _, turned = jax.jvp(lambda w: minus_mean(w, batches), (params,), (first,))
        return _add(first, -learning_rate / 2, turned)

    def diffusion(params: optax.Params, batches: Any) -> optax.Updates:
        deviations = _deviations(moves(params, batches))
        return jax.tree.map(lambda d: (learning_rate / len(d)) ** 0.5 * d, deviations)

    def stratonovich(params: optax.Params, batches: Any) -> optax.Updates:
        # The mean of the deviations is zero, and so is its derivative along them.
        deviations = _deviations(moves(params, batches))
        along = lambda batch, d: jax.jvp(lambda w: expanded(w, batch), (params,), (d,))[
            1
        ]
        terms = jax.vmap(along)(batches, deviations)
        mean = jax.tree.map(lambda t: jnp.mean(t, axis=0), terms)
        return _add(drift(params, batches), -learning_rate / 2, mean)

    return Equation(
        exact, expanded, drift, diffusion, stratonovich, learning_rate, order
    )


def _with_next(
    derivatives: Callable[[jax.Array], tuple[Any, ...]],
) -> Callable[[jax.Array], tuple[Any, ...]]:
    """From a function's first derivatives to one more of them."""

    def more(at: jax.Array) -> tuple[Any, ...]:
        values, tangents = jax.jvp(derivatives, (at,), (jnp.ones_like(at),))
        return (*values, tangents[-1])

    return more


def _dtype(params: optax.Params) -> Any:
    return common_dtype(*(leaf.dtype for leaf in jax.tree.leaves(params)))


def _add(tree: Any, factor: float, other: Any) -> Any:
    return jax.tree.map(lambda a, b: a + factor * b, tree, other)


def _deviations(moves: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda g: g - jnp.mean(g, axis=0), moves)


def _unit(tree: optax.Updates) -> optax.Updates:
    """Of norm one over all leaves; zero stays zero, and has no derivative there."""
    square = optax.tree.norm(tree, squared=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jax.tree.map(lambda leaf: leaf / norm.astype(leaf.dtype), tree)
