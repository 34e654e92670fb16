"""MSAM: momentum itself is the perturbation, so a step has one gradient.

Becker, Altrock, Risse (2024), *Momentum-SAM*, arXiv:2401.12033. The parameters that
training holds are the perturbed ones, `w + ρ v/‖v‖`, v the momentum; `settled` takes
the perturbation off again, as `optax.contrib.schedule_free_eval_params` does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MsamState(NamedTuple):
    """State of `msam`.

    Attributes:
      count: Steps.  # shape=(), dtype=int32
      trace: The momentum v.
      ahead: What the parameters are perturbed by.
    """

    count: jax.Array
    trace: optax.Updates
    ahead: optax.Updates


def msam(
    learning_rate: optax.Schedule, momentum: float = 0.9, rho: float = 0.05
) -> optax.GradientTransformation:
    """Momentum at weights that are perturbed along it.

    Args:
      learning_rate: By step.
      momentum: Of the steps.
      rho: The norm of the perturbation, over all leaves together.

    Returns:
      The transformation.

    Example:
      >>> tx = msam(lambda step: 0.1, momentum=0.0, rho=0.5)
      >>> params = {"w": jnp.array([1.0])}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"], settled(state, params)["w"]  # 1 - 0.1, and 0.5 ahead
      (Array([1.4], dtype=float32), Array([0.9], dtype=float32))
    """

    def init_fn(params: optax.Params) -> MsamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return MsamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update_fn(
        updates: optax.Updates, state: MsamState, params: Any = None
    ) -> tuple[optax.Updates, MsamState]:
        del params
        rate = learning_rate(state.count)
        trace = jax.tree.map(lambda v, g: momentum * v + g, state.trace, updates)
        scale = rho / jnp.maximum(optax.tree.norm(trace), 1e-30)
        ahead = jax.tree.map(lambda v: scale * v, trace)
        moved = jax.tree.map(
            lambda new, old, v: new - old - rate * v, ahead, state.ahead, trace
        )
        return moved, MsamState(state.count + 1, trace, ahead)

    return optax.GradientTransformation(init_fn, update_fn)


def settled(state: Any, params: optax.Params) -> optax.Params:
    """The parameters without their perturbation, by any state that holds `msam`'s."""
    is_mine = lambda node: isinstance(node, MsamState)
    found = jax.tree.leaves(state, is_leaf=is_mine)
    (mine,) = (node for node in found if is_mine(node))
    return jax.tree.map(lambda w, ahead: w - ahead, params, mine.ahead)
