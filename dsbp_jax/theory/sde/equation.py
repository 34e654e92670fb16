"""Drift and diffusion of an optimizer, to a chosen order in the SAM radius.

The optimizer draws one of n batches in each step, all alike, so its noise is known: it
is that of n moves γᵢ(w). Their mean is the drift, and their deviations are themselves a
factor of the covariance, `Σ = (1/n)Σᵢδᵢδᵢᵀ`: n Brownian motions drive the equation, and
no covariance is formed or factored. Everything is a gradient, or a derivative of one
along a direction.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.theory.sde.methods import Method
from dsbp_jax.tracking import Number, common_dtype, in_dtype

#: Powers of ρ that an expansion may keep.
MAX_ORDER = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Equation:
    """`dX = b(X)dt + √η Σ(X)^½dW` in units of time in which a step takes η.

    A tree of two numbers, ρ and η: what is compiled for one pair serves all. Batches
    are trees whose leaves have one axis in front, of the n batches that the optimizer
    draws from.

    Attributes:
      loss_fn: `(params, batch) -> ` scalar; static.
      method: What a step does.
      learning_rate: η.
      order: Powers of ρ that are kept; static.
      correction: Whether the term in η is; static.
    """

    loss_fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    method: Method
    learning_rate: Number
    order: int = dataclasses.field(metadata={"static": True})
    correction: bool = dataclasses.field(metadata={"static": True})

    def exact(self, params: optax.Params, batch: Any) -> optax.Updates:
        """γ, the move of the optimizer on one batch, over −η."""
        if self.method.ascent is None:
            return self.method.move(self._gradient(params, batch))
        at = self._along_the_perturbation(params, batch)
        return at(jnp.asarray(self.method.rho, _dtype(params)))

    def expanded(self, params: optax.Params, batch: Any) -> optax.Updates:
        """The same, by its Taylor polynomial in ρ."""
        if self.method.ascent is None:
            return self.exact(params, batch)
        at = self._along_the_perturbation(params, batch)
        derivatives: Callable[[jax.Array], tuple[Any, ...]] = lambda t: (at(t),)
        for _ in range(self.order):
            derivatives = _with_next(derivatives)
        total, *others = derivatives(jnp.zeros((), _dtype(params)))
        factor: Number = 1.0
        for power, term in enumerate(others, 1):
            factor = factor * self.method.rho / power
            total = _add(total, factor, term)
        return total

    def drift(self, params: optax.Params, batches: Any) -> optax.Updates:
        """b, a tree like the params."""
        first = self._minus_mean(params, batches)
        if not self.correction:
            return first
        minus_mean = lambda w: self._minus_mean(w, batches)
        _, turned = jax.jvp(minus_mean, (params,), (first,))
        return _add(first, -self.learning_rate / 2, turned)

    def diffusion(self, params: optax.Params, batches: Any) -> optax.Updates:
        """`√η·δ/√n`, leaves `(n, *shape)`: a column for each Brownian motion."""
        deviations = _deviations(self._moves(params, batches))
        scale = lambda d: in_dtype(self.learning_rate, d.dtype) / len(d)
        return jax.tree.map(lambda d: scale(d) ** 0.5 * d, deviations)

    def stratonovich(self, params: optax.Params, batches: Any) -> optax.Updates:
        """`b − ½Σ_k(∂σ_k)σ_k`, the same process's drift in Stratonovich's sense."""
        # The mean of the deviations is zero, and so is its derivative along them.
        deviations = _deviations(self._moves(params, batches))
        along = lambda batch, d: jax.jvp(
            lambda w: self.expanded(w, batch), (params,), (d,)
        )[1]
        terms = jax.vmap(along)(batches, deviations)
        mean = jax.tree.map(lambda t: jnp.mean(t, axis=0), terms)
        return _add(self.drift(params, batches), -self.learning_rate / 2, mean)

    def _gradient(self, params: optax.Params, batch: Any) -> optax.Updates:
        loss = lambda params: checks.scalar_loss(self.loss_fn(params, batch))
        return jax.grad(loss)(params)

    def _along_the_perturbation(
        self, params: optax.Params, batch: Any
    ) -> Callable[[jax.Array], optax.Updates]:
        """`t ↦ M(∇f(w + tv))`."""
        assert self.method.ascent is not None
        direction = _unit(self.method.ascent(self._gradient(params, batch)))

        def at(distance: jax.Array) -> optax.Updates:
            moved = jax.tree.map(
                lambda w, v: w + distance.astype(w.dtype) * v, params, direction
            )
            return self.method.move(self._gradient(moved, batch))

        return at

    def _moves(self, params: optax.Params, batches: Any) -> optax.Updates:
        return jax.vmap(self.expanded, (None, 0))(params, batches)

    def _minus_mean(self, params: optax.Params, batches: Any) -> optax.Updates:
        moves = self._moves(params, batches)
        return jax.tree.map(lambda g: -jnp.mean(g, axis=0), moves)


def modified_equation(
    loss_fn: Callable[..., jax.Array],
    method: Method,
    learning_rate: Number,
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
      The equation.

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

    return Equation(loss_fn, method, learning_rate, order, correction)


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


def _add(tree: Any, factor: Number, other: Any) -> Any:
    return jax.tree.map(lambda a, b: a + in_dtype(factor, b.dtype) * b, tree, other)


def _deviations(moves: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda g: g - jnp.mean(g, axis=0), moves)


def _unit(tree: optax.Updates) -> optax.Updates:
    """Of norm one over all leaves; zero stays zero, and has no derivative there."""
    square = optax.tree.norm(tree, squared=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jax.tree.map(lambda leaf: leaf / norm.astype(leaf.dtype), tree)
