"""What tasks have in common that tune a trained classifier."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments.tuned_config import MethodConfig

AT_ONCE = 500  # images of an evaluation
_WARMUP = 0.05  # share of the steps


class Tuned:
    """The parts of a `Task` that do not depend on what was done to the model.

    A subclass has the rest of `study.task.Task`.
    """

    digest = ""

    def compile(self, config: MethodConfig) -> None:
        """See `study.task.Task`."""
        jax.block_until_ready(self.step(self.init(config), config, 0))

    def observe(self, state: Any) -> tuple[dict[str, Any], Any]:
        """See `study.task.Task`."""
        return {"bases": {}, "probe": None}, state

    def advice(self, config: MethodConfig) -> str:
        """See `study.task.Task`."""
        return f"try a lower tune_rate than {config.tune_rate:g}"


def schedule(steps: int) -> optax.Schedule:
    """A rise to 1, and a cosine to 0 at the last of some steps."""
    return optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(1, round(_WARMUP * steps)), max(2, steps)
    )


def descend(
    weights: Any,
    grads: Any,
    opt_state: Any,
    rate: jax.Array,
    restrict: Callable[[Any], Any] = lambda updates: updates,
) -> tuple[Any, Any]:
    """A step of Adam.

    Args:
      weights: What is trained.
      grads: Its gradient.
      opt_state: That of `optax.scale_by_adam`.
      rate: The learning rate.
      restrict: What an update may do.

    Returns:
      The new weights and the new state.
    """
    updates, opt_state = optax.scale_by_adam().update(grads, opt_state)
    move = lambda w, update: w + -rate * update
    return jax.tree.map(move, weights, restrict(updates)), opt_state


def stepped(
    state: Any,
    loss_fn: Callable[[Any], tuple[jax.Array, jax.Array]],
    rate: jax.Array,
    restrict: Callable[[Any], Any] = lambda updates: updates,
) -> tuple[Any, dict[str, jax.Array]]:
    """A step of tuning.

    Args:
      state: With `trained`, `opt_state` and `step`.
      loss_fn: Of what is trained; the loss to descend, and the one to report.
      rate: The learning rate.
      restrict: What an update may do.

    Returns:
      The new state, and the loss to report.
    """
    (_, value), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
    moved, opt_state = descend(state.trained, grads, state.opt_state, rate, restrict)
    new = state._replace(trained=moved, opt_state=opt_state, step=state.step + 1)
    return new, {"loss": value}


def drawn(
    split: data.Split, count: int, seed: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of step `number`: so many, drawn without replacement."""
    rng = np.random.default_rng((seed, number))
    some = split.take(rng.permutation(len(split))[:count])
    return some.images, some.labels


def entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross entropy of each image, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def sums(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Those of the losses, and of the right answers."""
    right = jnp.sum(logits.argmax(-1) == labels)
    return jnp.stack([entropies(logits, labels).sum(), right])


def means(
    sums: Callable[[np.ndarray, np.ndarray], jax.Array], split: data.Split
) -> list[float]:
    """Means over a split of what a function sums up over images and labels."""
    found = [
        sums(split.images[at:end], split.labels[at:end])
        for at in range(0, len(split), AT_ONCE)
        for end in [min(at + AT_ONCE, len(split))]
    ]
    total = np.sum(jax.device_get(found), axis=0, dtype=np.float64)
    return [float(number) for number in total / len(split)]
