"""Adapting to one task: a few steps of any optimizer from a common start."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax.layers import map_paths
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meta.forward import batchable, capturing
from dsbp_jax.transforms import MissingActivations, with_bases
from dsbp_jax.transforms.reading import tracked_by_side


class WithRates(NamedTuple):
    """Meta-parameters: a start, and how fast to leave it.

    Attributes:
      params: The start.
      rates: A factor for the inner updates of each leaf, of shape `()` or of the
        leaf's.
    """

    params: Any
    rates: Any


def with_rates(params: Any, initial: float = 1.0) -> WithRates:
    """A start whose inner learning rates are learned with it, one per leaf.

    Give the result to `Maml.meta_loss` and to the outer optimizer in place of the
    params. The inner updates of a leaf are multiplied by its rate, so the inner
    optimizer's own learning rate is the unit.

    Args:
      params: The start.
      initial: The first value of every rate.

    Returns:
      The meta-parameters; rates are float32 of shape `()`.

    References:
      Li et al., Meta-SGD, arXiv 1707.09835, 2017 (there a rate for each entry);
      Antoniou et al., How to train your MAML, ICLR 2019 (one for each layer).

    Example:
      >>> with_rates({"kernel": jnp.ones((2, 2))}, 0.5).rates["kernel"].item()
      0.5
    """
    rate = lambda leaf: jnp.full((), initial, jnp.float32)
    return WithRates(params, jax.tree.map(rate, params))


def plain_params(params: Any) -> Any:
    """The start, without its rates if it has any."""
    return params.params if isinstance(params, WithRates) else params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How to adapt to a task; static.

    Attributes:
      loss_fn: `loss_fn(params, batch)`, a scalar.
      inner: The optimizer.
      num_steps: Its steps.
      first_order: Whether the updates are constants to a derivative.
      moves: Whether a leaf is adapted, by its canonical path; None adapts all.
      batch_size: Examples of a step, taken in turn; None takes all in each.
      checkpoint: Whether a derivative computes the steps again, and does not store
        what is inside of them.
    """

    loss_fn: Callable[..., Any]
    inner: optax.GradientTransformationExtraArgs
    num_steps: int
    first_order: bool = False
    moves: Callable[[str], bool] | None = None
    batch_size: int | None = None
    checkpoint: bool = False

    def run(
        self,
        params: Any,
        support: Any,
        *,
        bases: Mapping[str, EigenBasis] | None = None,
        key: jax.Array | None = None,
        after: Callable[[Any], Any] = lambda params: None,
    ) -> tuple[Any, Any]:
        """Adapts to one task.

        Args:
          params: The start, with rates or without.
          support: The task's examples, arrays of shape `(example, …)`.
          bases: What the inner optimizer holds on to in place of bases of its own.
          key: A PRNG key; each step hands one to `loss_fn`, as `key=`.
          after: What to note of the params after each step.

        Returns:
          The adapted params, and what was noted, stacked over the steps.
        """
        start = plain_params(params)
        moving, merge = self._split(start)
        state = self.inner.init(moving)
        extra: dict[str, Any] = {}
        if bases is not None:
            state = with_bases(state, bases)
            extra["refresh"] = False
        if self.first_order:
            state = jax.lax.stop_gradient(state)

        def loss(moving: Any, index: jax.Array, *, activations: bool = False) -> Any:
            run = capturing if activations else batchable
            batch = self._batch(support, index)
            keys = {} if key is None else {"key": jax.random.fold_in(key, index)}
            return run(self.loss_fn)(merge(moving), batch, **keys)

        def update(grads: Any, state: Any, moving: Any, index: Any, **more: Any) -> Any:
            """The inner optimizer, with all that one may ask for."""
            value_fn = lambda moving: loss(moving, index)
            grad_fn = lambda moving, _: jax.grad(value_fn)(moving)
            more |= {"value_fn": value_fn, "grad_fn": grad_fn, "grad": grads}
            return self.inner.update(grads, state, moving, **more, **extra)

        def wants_activations() -> bool:
            if bases is not None or tracked_by_side(state) is None:
                return False
            try:
                index, value = jnp.zeros((), jnp.int32), jnp.zeros(())
                probe = lambda: update(moving, state, moving, index, value=value)[0]
                jax.eval_shape(probe)
            except MissingActivations:
                return True
            return False

        capture = wants_activations()

        def step(carry: tuple, index: jax.Array) -> tuple:
            moving, state = carry
            at = jax.lax.stop_gradient(moving) if self.first_order else moving
            more: dict[str, Any] = {}
            if capture:
                grad = jax.value_and_grad(loss, has_aux=True)
                (value, more["activations"]), grads = grad(at, index, activations=True)
            else:
                value, grads = jax.value_and_grad(loss)(at, index)
            updates, state = update(grads, state, at, index, value=value, **more)
            if isinstance(params, WithRates):
                scale = lambda u, rate: (u * rate).astype(u.dtype)
                updates = jax.tree.map(scale, updates, self._split(params.rates)[0])
            moving = optax.apply_updates(moving, updates)
            return (moving, state), after(merge(moving))

        if self.checkpoint:
            step = jax.checkpoint(step, prevent_cse=False)
        steps = jnp.arange(self.num_steps)
        carry, noted = jax.lax.scan(step, (moving, state), steps)
        return merge(carry[0]), noted

    def _split(self, tree: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The leaves that move (None for others), and a function to put them back."""
        moves = self.moves
        if moves is None:
            return tree, lambda moving: moving
        moving = map_paths(lambda path, leaf: leaf if moves(path) else None, tree)
        fixed = map_paths(lambda path, leaf: None if moves(path) else leaf, tree)
        pick = lambda a, b: b if a is None else a
        is_none = lambda leaf: leaf is None
        return moving, lambda moving: jax.tree.map(pick, moving, fixed, is_leaf=is_none)

    def _batch(self, support: Any, index: jax.Array) -> Any:
        """The examples of a step."""
        if self.batch_size is None:
            return support
        number = jax.tree.leaves(support)[0].shape[0]
        rows = (index * self.batch_size + jnp.arange(self.batch_size)) % number
        return jax.tree.map(lambda leaf: leaf[rows], support)
