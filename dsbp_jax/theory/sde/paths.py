"""Paths of the equation, by diffrax, and of the optimizer that it stands for.

Time is counted in steps of the optimizer: `dX = ηb dτ + √η σ dW` with τ = t/η. The
noise of an equation depends on where it is, so Stratonovich's form and Heun's method
are used: as the noise is of size √η, the error of a step of h steps is O(h²) in the
drift and O(ηh) in the noise, below what is left out of the equation itself.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from dsbp_jax import checks
from dsbp_jax.theory.sde.equation import Equation
from dsbp_jax.theory.sde.validity import (
    Validity,
    require_valid,
    validity,
    warn_unless_valid,
)


class Paths(NamedTuple):
    """What was seen of several paths.

    Attributes:
      steps: When, in steps of the optimizer.  # shape=(s,), dtype=int32
      observed: What `observe` gave, leaves `(num_paths, s, …)`.
      params: Where the paths ended, leaves `(num_paths, *shape)`.
      validity: Of the expansion there, the worst of all paths; None of the optimizer.
    """

    steps: jax.Array
    observed: Any
    params: Any
    validity: Validity | None


def sde_paths(
    equation: Equation,
    params: optax.Params,
    batches: Any,
    num_steps: int,
    *,
    key: jax.Array,
    num_paths: int,
    observe: Callable[[optax.Params], Any] = lambda params: params,
    every: int = 1,
    substeps: int = 2,
) -> Paths:
    """Integrates the equation over the time of so many steps.

    Args:
      equation: From `modified_equation`.
      params: Where all paths start.
      batches: The n batches that the optimizer draws from, on a leading axis.
      num_steps: Steps of the optimizer; the time is η times as long.
      key: A PRNG key.
      num_paths: Independent paths, under one `vmap`.
      observe: What to keep of the params, at the start and every so often.
      every: How often, in steps; divides `num_steps`.
      substeps: Steps of the integration for each step of the optimizer.

    Returns:
      The paths. Where the expansion does not hold at their ends, a warning says so.

    Raises:
      ImportError: diffrax is not installed.
      ValueError: An argument is out of its range, or the expansion does not hold at
        the start.

    References:
      Kidger, On neural differential equations, 2021, for diffrax.

    Example:
      >>> import dsbp_jax.theory.sde as sde
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> equation = sde.modified_equation(loss_fn, sde.sgd(), 0.1)
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> paths = sde.sde_paths(equation, jnp.ones(1), x, 10, key=jax.random.key(0),
      ...                       num_paths=4, every=5)
      >>> paths.observed.shape, paths.steps.tolist()
      ((4, 3, 1), [0, 5, 10])
    """
    diffrax = _diffrax()
    steps = _times(num_steps, every)
    num_paths = checks.positive_int("num_paths", num_paths)
    substeps = checks.positive_int("substeps", substeps)
    count = _num_batches(batches)
    require_valid(jax.jit(validity)(equation, params, batches), "at the start")
    flat, unravel = ravel_pytree(params)
    eta = equation.learning_rate
    ravel = lambda tree: ravel_pytree(tree)[0]

    def drift(tau: Any, flat: jax.Array, batches: Any) -> jax.Array:
        del tau
        return eta * ravel(equation.stratonovich(unravel(flat), batches))

    def diffusion(tau: Any, flat: jax.Array, batches: Any) -> jax.Array:
        del tau
        columns = jax.vmap(ravel)(equation.diffusion(unravel(flat), batches))
        return eta**0.5 * columns.T

    @jax.jit
    def solve(key: jax.Array, flat: jax.Array, batches: Any) -> tuple[Any, Any]:
        noise = diffrax.UnsafeBrownianPath(
            jax.ShapeDtypeStruct((count,), flat.dtype), key=key
        )
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise)
        )
        seen = diffrax.SubSaveAt(
            ts=jnp.asarray(steps, flat.dtype), fn=lambda t, y, args: observe(unravel(y))
        )
        solution = diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            t0=0,
            t1=num_steps,
            dt0=1 / substeps,
            y0=flat,
            args=batches,
            saveat=diffrax.SaveAt(subs=[seen, diffrax.SubSaveAt(t1=True)]),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=num_steps * substeps + 1,
        )
        observed, end = solution.ys
        return observed, unravel(end[0])

    keys = jax.random.split(key, num_paths)
    observed, ends = jax.vmap(solve, (0, None, None))(keys, flat, batches)
    at_ends = jax.jit(
        lambda ends, batches: jax.vmap(validity, (None, 0, None))(
            equation, ends, batches
        )
    )(ends, batches)
    worst = jax.tree.map(jnp.max, at_ends)
    warn_unless_valid(worst, "at the end of a path")
    return Paths(jnp.asarray(steps), observed, ends, worst)


def optimizer_paths(
    equation: Equation,
    params: optax.Params,
    batches: Any,
    num_steps: int,
    *,
    key: jax.Array,
    num_paths: int,
    observe: Callable[[optax.Params], Any] = lambda params: params,
    every: int = 1,
) -> Paths:
    """Runs the optimizer that an equation stands for, on a batch drawn in each step.

    Args:
      equation: Its exact move and η are what is used of it.
      params: Where all paths start.
      batches: The n batches, on a leading axis, drawn with replacement.
      num_steps: Steps.
      key: A PRNG key.
      num_paths: Independent paths, under one `vmap`.
      observe: What to keep of the params, at the start and every so often.
      every: How often, in steps; divides `num_steps`.

    Returns:
      The paths.

    Raises:
      ValueError: An argument is out of its range.

    Example:
      >>> import dsbp_jax.theory.sde as sde
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> equation = sde.modified_equation(loss_fn, sde.sgd(), 0.1)
      >>> paths = sde.optimizer_paths(equation, jnp.ones(1), jnp.zeros((1, 1)), 2,
      ...                             key=jax.random.key(0), num_paths=1)
      >>> print(paths.observed[0, :, 0])
      [1.   0.9  0.81]
    """
    steps = _times(num_steps, every)
    num_paths = checks.positive_int("num_paths", num_paths)
    count = _num_batches(batches)

    @jax.jit
    def run(key: jax.Array, params: optax.Params, batches: Any) -> tuple[Any, Any]:
        chosen = jax.random.randint(key, (num_steps // every, every), 0, count)

        def step(params: optax.Params, index: jax.Array) -> tuple[optax.Params, None]:
            batch = jax.tree.map(lambda x: x[index], batches)
            move = equation.exact(params, batch)
            eta = equation.learning_rate
            return jax.tree.map(lambda w, g: w - eta * g, params, move), None

        def some(params: optax.Params, indices: jax.Array) -> tuple[optax.Params, Any]:
            params, _ = jax.lax.scan(step, params, indices)
            return params, observe(params)

        end, seen = jax.lax.scan(some, params, chosen)
        first = observe(params)
        with_first = lambda x, y: jnp.concatenate([jnp.asarray(x)[None], y])
        return jax.tree.map(with_first, first, seen), end

    keys = jax.random.split(key, num_paths)
    observed, ends = jax.vmap(run, (0, None, None))(keys, params, batches)
    return Paths(jnp.asarray(steps), observed, ends, None)


def _times(num_steps: int, every: int) -> np.ndarray:
    """The steps at which something is kept."""
    num_steps = checks.positive_int("num_steps", num_steps)
    every = checks.positive_int("every", every)
    if num_steps % every:
        raise ValueError(f"every must divide num_steps={num_steps}, got {every}")
    return np.arange(0, num_steps + 1, every, dtype=np.int32)


def _num_batches(batches: Any) -> int:
    """The length n of the leading axis that all leaves have."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    counts = {shape[0] if shape else None for shape in shapes}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            "batches must have one leading axis, of the same length in all leaves, got "
            f"shapes {shapes}"
        )
    return counts.pop() or 0


def _diffrax() -> ModuleType:
    """The optional package."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "sde_paths needs diffrax, which is not installed; it comes with the extra "
            "`theory`: pip install 'dsbp-jax[theory]'"
        ) from error
    return diffrax
