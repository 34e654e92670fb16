"""Moments of an optimizer and of its equation without sampling, for few parameters.

`u(w) = E[φ(W_N) | W_0 = w]` obeys a backward equation, one for the optimizer (a mean
over batches in each step), one for the process (Kolmogorov's). u is smooth where the
moves are, so its Chebyshev series on a box converges like a geometric one, and N steps
are the N-th power of a small matrix. What sampling reaches with 10^12 paths it gives in
a second: weak errors of 1e-9 can be measured. All in float64 but for the moves, which
have the dtype of the params.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from dsbp_jax import checks
from dsbp_jax.theory.sde.equation import Equation

_MAX_PARAMS = 3

Box = Sequence[tuple[float, float]]


def expectations(
    equation: Equation,
    params: optax.Params,
    batches: Any,
    num_steps: int,
    functions: Callable[[np.ndarray], np.ndarray],
    *,
    box: Box,
    nodes: int = 16,
    of: str = "sde",
) -> np.ndarray:
    """`E[φ(W)]` after so many steps, of the equation or of its optimizer.

    Args:
      equation: From `modified_equation`.
      params: Where it starts, up to 3 numbers in all.
      batches: The n batches that the optimizer draws from, on a leading axis.
      num_steps: N; the time of the equation is Nη.
      functions: φ, from points `(p, d)`, float64, to values `(p, m)`.
      box: For each parameter an interval, inside of which paths that start there stay
        but for some steps; moves are smooth on it (no gradient vanishes where ρ > 0).
      nodes: Chebyshev nodes for each parameter.
      of: `"sde"` or `"optimizer"`.

    Returns:
      Shape `(m,)`, float64.

    Raises:
      ValueError: An argument is out of its range, or the start is outside of the box.

    Example:
      >>> import jax.numpy as jnp
      >>> import dsbp_jax.theory.sde as sde
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> equation = sde.modified_equation(loss_fn, sde.sgd(), 0.5)
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> expectations(equation, jnp.ones(1), x, 2, lambda w: w, box=[(-2, 2)],
      ...              of="optimizer").round(6)
      array([0.25])
    """
    checks.one_of("of", of, ("sde", "optimizer"))
    num_steps = checks.positive_int("num_steps", num_steps)
    nodes = checks.positive_int("nodes", nodes, 2)
    flat, unravel = ravel_pytree(params)
    checks.positive_int("the number of parameters", flat.size, 1, _MAX_PARAMS)
    low, high = np.asarray(box, float).T
    start = np.asarray(flat, float)[None]
    if len(low) != flat.size or not np.all((low <= start) & (start <= high)):
        raise ValueError(
            f"box must have an interval around each of {start[0]}, got {box!r}"
        )
    basis = _Chebyshev(low, high, nodes)
    points = basis.points
    trees = jax.vmap(unravel)(jnp.asarray(points, flat.dtype))
    seen = lambda which: np.asarray(which(equation, trees, batches), float)
    values = basis.values(points)
    if of == "optimizer":
        moves = seen(_moves)
        following = points[:, None] - float(equation.learning_rate) * moves
        mean = np.mean(
            [basis.values(following[:, i]) for i in range(moves.shape[1])], axis=0
        )
        power = np.linalg.matrix_power(np.linalg.solve(values, mean), num_steps)
    else:
        drift, columns = seen(_drift), seen(_diffusion)
        covariance = np.einsum("pni,pnj->pij", columns, columns)
        generator = np.einsum("pi,ipc->pc", drift, basis.gradient(points))
        generator += 0.5 * np.einsum(
            "pij,ijpc->pc", covariance, basis.second_derivative(points)
        )
        time = num_steps * float(equation.learning_rate)
        power = _exponential(time * np.linalg.solve(values, generator))
    coefficients = np.linalg.solve(values, functions(points))
    return (basis.values(start) @ (power @ coefficients))[0]


def _raveled(tree: Any) -> jax.Array:
    """The leaves of a tree in one vector."""
    return ravel_pytree(tree)[0]


@jax.jit
def _moves(equation: Equation, points: Any, batches: Any) -> jax.Array:
    """Exact moves `(p, n, d)`."""
    one = lambda w, batch: _raveled(equation.exact(w, batch))
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(points, batches)


@jax.jit
def _drift(equation: Equation, points: Any, batches: Any) -> jax.Array:
    """Shape `(p, d)`."""
    one = lambda w: _raveled(equation.drift(w, batches))
    return jax.vmap(one)(points)


@jax.jit
def _diffusion(equation: Equation, points: Any, batches: Any) -> jax.Array:
    """Columns `(p, n, d)`."""
    one = lambda w: jax.vmap(_raveled)(equation.diffusion(w, batches))
    return jax.vmap(one)(points)


class _Chebyshev:
    """Products of Chebyshev polynomials on a box.

    Args:
      low: Its lower ends, shape `(d,)`.
      high: Its upper ends.
      nodes: Polynomials for each axis.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, nodes: int):
        self._middle, self._half = (low + high) / 2, (high - low) / 2
        self._nodes = nodes
        angles = (np.arange(nodes) + 0.5) * np.pi / nodes
        grid = np.meshgrid(*[np.cos(angles)] * len(low), indexing="ij")
        unit = np.stack([axis.ravel() for axis in grid], axis=-1)
        #: Shape `(nodes^d, d)`.
        self.points = self._middle + self._half * unit

    def values(self, points: np.ndarray, orders: Sequence[int] = ()) -> np.ndarray:
        """Of all polynomials, differentiated along the axes in `orders`, `(p, c)`."""
        unit = (points - self._middle) / self._half
        result = np.ones((len(points), 1))
        for axis in range(points.shape[-1]):
            times = list(orders).count(axis)
            derivative = np.polynomial.chebyshev.chebder(
                np.eye(self._nodes), times, scl=1 / self._half[axis]
            )
            one = np.polynomial.chebyshev.chebval(unit[:, axis], derivative).T
            result = (result[:, :, None] * one[:, None, :]).reshape(len(points), -1)
        return result

    def gradient(self, points: np.ndarray) -> np.ndarray:
        """Shape `(d, p, c)`."""
        axes = range(points.shape[-1])
        return np.stack([self.values(points, (i,)) for i in axes])

    def second_derivative(self, points: np.ndarray) -> np.ndarray:
        """Shape `(d, d, p, c)`."""
        axes = range(points.shape[-1])
        return np.stack(
            [np.stack([self.values(points, (i, j)) for j in axes]) for i in axes]
        )


def _exponential(matrix: np.ndarray) -> np.ndarray:
    """`exp` by scaling, eighteen terms at a norm of at most ½, and squaring."""
    norm = float(np.linalg.norm(matrix, 1))
    squarings = max(0, math.ceil(math.log2(max(norm, 1e-300))) + 1)
    small = matrix / 2**squarings
    term = result = np.eye(len(matrix))
    for power in range(1, 19):
        term = term @ small / power
        result = result + term
    return np.linalg.matrix_power(result, 2**squarings)
