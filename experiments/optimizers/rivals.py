"""Rivals that optax has not: short, readable references, for comparisons only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dsbp_jax


def on_matrices(
    inner: optax.GradientTransformation, layout: dsbp_jax.Layout | None
) -> optax.GradientTransformation:
    """A transformation of matrices, on leaves of any shape.

    Args:
      inner: A transformation of leaves with two axes.
      layout: Matrix views, without batch axes, of leaves with more than two.

    Returns:
      A transformation.
    """

    def matrix(path: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 2 or layout is None:
            return leaf
        *_, d_out = layout[path].matrix_shape(leaf.shape)
        return layout[path].to_matrix(leaf).reshape(-1, d_out)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        leaves = dsbp_jax.layers.leaves_by_path(updates)
        found, state = inner.update(dsbp_jax.layers.map_paths(matrix, updates), state)

        def back(path: str, leaf: jax.Array) -> jax.Array:
            if leaves[path].ndim == 2 or layout is None:
                return leaf
            return layout[path].from_matrix(leaf, leaves[path].shape)

        return dsbp_jax.layers.map_paths(back, found), state

    init = lambda params: inner.init(dsbp_jax.layers.map_paths(matrix, params))
    return optax.GradientTransformation(init, update_fn)


class SoapState(NamedTuple):
    """Moments of one optimizer in turned coordinates, by leaf."""

    count: jax.Array  # shape=(), dtype=int32
    mu: optax.Updates
    nu: optax.Updates
    left: Any
    right: Any
    turn_left: Any
    turn_right: Any


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    *,
    every: int = 10,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam in the eigenbases of Shampoo's two factors, of leaves with two axes.

    Args:
      b1: Of the first moment.
      b2: Of the second moment and of both factors.
      every: Steps between two QR steps of the bases.
      eps: Beside the root of the second moment.

    Returns:
      A transformation.

    References:
      [P] Vyas et al., SOAP, arXiv 2409.11321.
    """

    def init_fn(params: optax.Params) -> SoapState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        square = lambda axis: jax.tree.map(
            lambda leaf: jnp.zeros((leaf.shape[axis],) * 2, leaf.dtype), params
        )
        factors = square(0), square(1), square(0), square(1)
        return SoapState(jnp.int32(0), zeros(), zeros(), *factors)

    def update_fn(
        updates: optax.Updates, state: SoapState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SoapState]:
        del params
        count = state.count + 1
        first = count == 1
        due = count % every == 0

        def one(g, mu, nu, left, right, turn_left, turn_right):
            ema = lambda old, new, decay: decay * old + (1 - decay) * new
            left, right = ema(left, g @ g.T, b2), ema(right, g.T @ g, b2)

            def turned(factor, turn):
                cold = lambda: jnp.linalg.eigh(factor)[1][:, ::-1]
                power = lambda: jnp.linalg.qr(factor @ turn)[0]
                return jax.lax.cond(
                    first, cold, lambda: jax.lax.cond(due, power, lambda: turn)
                )

            # The step is made in the bases of the step before, as in the paper; but
            # for the first, which has none.
            new_left, new_right = turned(left, turn_left), turned(right, turn_right)
            pick = lambda new, old: jnp.where(first, new, old)
            old_left = pick(new_left, turn_left)
            old_right = pick(new_right, turn_right)
            rotate = lambda x: old_left.T @ x @ old_right
            mu, nu = ema(mu, g, b1), ema(nu, rotate(g) ** 2, b2)
            unbiased = lambda x, decay: x / (1 - decay**count)
            step = rotate(unbiased(mu, b1)) / (jnp.sqrt(unbiased(nu, b2)) + eps)
            step = old_left @ step @ old_right.T
            return step, mu, nu, left, right, new_left, new_right

        found = jax.tree.map(one, updates, *state[1:])
        parts = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0,) * 7), found
        )
        return parts[0], SoapState(count, *parts[1:])

    return optax.GradientTransformation(init_fn, update_fn)


def kaon(num_steps: int = 5) -> optax.GradientTransformation:
    """Muon's control: its singular vectors, with scrambled singular values.

    Args:
      num_steps: Of the chaotic map; 5 cost as much as Muon's own iteration.

    Returns:
      A stateless transformation of leaves with two axes, to be put after momentum.
      Its updates have the size of Adam's, 0.2 for each entry.

    References:
      [P] Shumaylov et al., arXiv 2605.11181: `X ← 4.1·(I − XXᵀ)²X`, over 1.175.
    """

    def one(u: jax.Array) -> jax.Array:
        a, b = u.shape
        x = u if a <= b else u.T
        x = x / (jnp.linalg.norm(x) + 1e-12)
        for _ in range(num_steps):
            rest = jnp.eye(len(x), dtype=x.dtype) - x @ x.T
            x = 4.1 * (rest @ (rest @ x))
        x = x * (0.2 * max(a, b) ** 0.5 / 1.175)
        return x if a <= b else x.T

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))
