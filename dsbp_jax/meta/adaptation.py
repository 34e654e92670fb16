"""Adapting to one task: a few steps of any optimizer from a common start."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import map_paths, require_paths
from dsbp_jax.meta.patched import with_activations, with_patches
from dsbp_jax.tracking import MissingActivations, Spaces, spectral_states
from dsbp_jax.transforms import with_bases

START = "params"  # what the paths of a start begin with in `WithRates`


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
    params; `Maml.adapt` returns params without rates. The inner updates of a leaf are
    multiplied by its rate, so the inner optimizer's own learning rate is the unit.

    Args:
      params: The start.
      initial: The first value of every rate.

    Returns:
      The meta-parameters; rates are float32 of shape `()`.

    References:
      [P] Li et al., Meta-SGD, arXiv 1707.09835, 2017 (there a rate for each entry);
      Antoniou et al., How to train your MAML, ICLR 2019 (for each layer and step).
      [O] A rate for each leaf.

    Example:
      >>> with_rates({"kernel": jnp.ones((2, 2))}, 0.5).rates["kernel"].item()
      0.5
    """
    rate = lambda leaf: jnp.full((), initial, jnp.float32)
    return WithRates(params, jax.tree.map(rate, params))


def key_argument(key: jax.Array | None, step: int | jax.Array) -> dict[str, jax.Array]:
    """The PRNG key of a step as the loss takes it: no argument where there is none."""
    return {} if key is None else {"key": jax.random.fold_in(key, step)}


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
        bases: Spaces | None = None,
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
        # Of the first order, updates are constants; what they are made of as well, so
        # that nothing is differentiated in vain (nor a loop that can't be).
        constant = jax.lax.stop_gradient if self.first_order else lambda tree: tree
        moving, merge = self.split(start)
        task = _Task(self, support, key, self.split(constant(start))[1])
        rates = None
        if isinstance(params, WithRates):
            rates, _ = self.split(params.rates)
        state = self.inner.init(constant(moving))
        extra: dict[str, Any] = {}
        capture = False
        if bases is not None:
            state = _hold(state, bases, isinstance(params, WithRates))
            extra["refresh"] = False
        elif any(one.entries() for one in spectral_states(state)):
            capture = task.wants_activations(moving, state)

        def step(carry: tuple, index: jax.Array) -> tuple:
            moving, state = carry
            updates, state = task.update(constant(moving), state, index, capture, extra)
            updates = constant(updates)
            if rates is not None:
                updates = jax.tree.map(_scale, updates, rates)
            moving = optax.apply_updates(moving, updates)
            return (moving, state), after(merge(moving))

        if self.checkpoint:
            step = jax.checkpoint(step, prevent_cse=False)
        steps = jnp.arange(self.num_steps)
        result: Any = jax.lax.scan(step, (moving, state), steps)
        (moving, _), noted = result
        return merge(moving), noted

    def split(self, tree: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The leaves that move (None for others), and a function to put them back."""
        moves = self.moves
        if moves is None:
            return tree, lambda moving: moving
        moving = map_paths(lambda path, leaf: leaf if moves(path) else None, tree)
        fixed = map_paths(lambda path, leaf: None if moves(path) else leaf, tree)
        pick = lambda a, b: b if a is None else a
        is_none = lambda leaf: leaf is None
        return moving, lambda moving: jax.tree.map(pick, moving, fixed, is_leaf=is_none)


def _scale(update: jax.Array, rate: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # in the wider of the two
        return (update * rate).astype(update.dtype)


def _hold(state: Any, bases: Spaces, with_rates: bool) -> Any:
    """The state of an inner optimizer on given bases, constants to every derivative.

    Raises:
      ValueError: It tracks leaves that `bases` lacks, on some side, or has no bases to
        replace.
    """
    if not isinstance(bases, Mapping):
        raise ValueError(
            "bases must map paths to eigenspaces, as dsbp_jax.eigenspaces(opt_state) "
            f"does, got {type(bases).__name__}"
        )
    states = spectral_states(state)
    if not states:
        raise ValueError(
            "bases must be None with an inner optimizer that tracks none, got those of "
            f"{', '.join(bases) or 'no leaf'}"
        )
    wanted = {path for one in states for _, path in one.entries()}
    named = {path: f"{START}/{path}" for path in wanted}
    if with_rates and all(name in bases for name in named.values()):
        bases = {path: bases[name] for path, name in named.items()}
    require_paths(sorted(wanted), bases, "bases")
    if not wanted:  # every layer is as small as its basis, or nothing is projected
        return state
    return with_bases(state, jax.lax.stop_gradient(dict(bases)))


@dataclasses.dataclass(frozen=True)
class _Task:
    """One task, and one inner step on it.

    Attributes:
      adaptation: How to adapt to it.
      support: The examples.
      key: A PRNG key, or None.
      merge: Puts the leaves that do not move beside those that do.
    """

    adaptation: Adaptation
    support: Any
    key: jax.Array | None
    merge: Callable[[Any], Any]

    def loss(self, moving: Any, index: jax.Array, *, capture: bool = False) -> Any:
        """The loss of a step, with the activations if wanted."""
        keys = key_argument(self.key, index)
        run = with_activations if capture else with_patches
        fn = run(self.adaptation.loss_fn)
        out = fn(self.merge(moving), self.batch(index), **keys)
        checks.scalar_loss(out[0] if capture else out)
        return out

    def batch(self, index: jax.Array) -> Any:
        """The examples of a step."""
        size = self.adaptation.batch_size
        if size is None:
            return self.support
        number = jax.tree.leaves(self.support)[0].shape[0]
        rows = (index * size + jnp.arange(size)) % number
        return jax.tree.map(lambda leaf: leaf[rows], self.support)

    def update(
        self,
        moving: Any,
        state: Any,
        index: jax.Array,
        capture: bool,
        extra: Mapping[str, Any],
    ) -> tuple[Any, Any]:
        """The updates of a step, and the optimizer's new state."""
        more = dict(extra)
        loss = functools.partial(self.loss, capture=capture)
        out, grads = jax.value_and_grad(loss, has_aux=capture)(moving, index)
        if capture:
            out, more["activations"] = out
        return self.inner_update(grads, state, moving, index, value=out, **more)

    def inner_update(
        self, grads: Any, state: Any, moving: Any, index: jax.Array, **more: Any
    ) -> tuple[Any, Any]:
        """The inner optimizer, with all that one may ask for."""

        # The line searches of optax want each argument that is not theirs named here.
        def value_fn(
            moving: Any,
            grad_fn: Any = None,
            activations: Any = None,
            refresh: Any = None,
        ) -> Any:
            del grad_fn, activations, refresh
            return self.loss(moving, index)

        grad_fn = lambda moving, _: jax.grad(value_fn)(moving)
        more |= {"value_fn": value_fn, "grad_fn": grad_fn, "grad": grads}
        return self.adaptation.inner.update(grads, state, moving, **more)

    def wants_activations(self, moving: Any, state: Any) -> bool:
        """Whether the inner optimizer cannot do without the activations."""
        index = jnp.zeros((), jnp.int32)

        def probe() -> Any:
            value = self.loss(moving, index)
            return self.inner_update(moving, state, moving, index, value=value)[0]

        try:
            jax.eval_shape(probe)
        except MissingActivations:
            return True
        return False
