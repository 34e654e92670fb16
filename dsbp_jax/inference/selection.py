"""Which layers to move: those that undo shifts which no stream is judged by."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.inference import guard
from dsbp_jax.inference.inputs import Models, arguments, moved_pass
from dsbp_jax.inference.settings import Settings
from dsbp_jax.inference.shifts import SHIFTS, Range, shifted
from dsbp_jax.layers import trace


def choose(
    fn: Callable[[Any, Any], Any],
    params: Any,
    models: Models,
    names: Sequence[str],
    x: Any,
    answer: Any,
    logits: bool,
    settings: Settings,
) -> list[str]:
    """The layers to move, from the input on, each tried beside those before it.

    Args:
      fn: The model.
      params: Its parameters.
      models: Of the inputs of its layers on source data.
      names: The layers, in the order of the model.
      x: A source batch, which is shifted.
      answer: The outputs for it.
      logits: Whether these are logits.
      settings: What is asked of a layer.

    Returns:
      The layers; none where x is not floating-point.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return []
    source = {name: models[name] for name in names}

    @jax.jit
    def loss(params: Any, x: Any, answer: Any, chosen: Any) -> jax.Array:
        traced = trace(fn, params, (x,), {})
        weight = len(x) / (len(x) + settings.prior)
        outputs, _ = moved_pass(
            traced,
            arguments(params, x),
            source,
            source,
            weight,
            settings.rows,
            settings.limit,
            chosen,
        )
        return apart(answer, outputs, logits)

    x = jnp.asarray(x)
    axes = tuple(range(x.ndim - 1))
    span = Range(jnp.min(x, axis=axes), jnp.max(x, axis=axes))
    inputs = [shifted(name, x, jax.random.key(0), span) for name in SHIFTS]
    switches = {
        name: np.zeros(models[name].basis.trace.shape, np.float32) for name in names
    }

    def mean_loss() -> float:
        found = [float(loss(params, one, answer, switches)) for one in inputs]
        return float(np.mean(found))

    best = mean_loss()
    chosen: list[str] = []
    for name in names:
        if len(chosen) == settings.moved:
            break
        switches[name] = np.ones_like(switches[name])
        now = mean_loss()
        if now < (1 - settings.gain) * best:
            best = now
            chosen.append(name)
        else:
            switches[name] = np.zeros_like(switches[name])
    return chosen


def apart(answer: Any, found: Any, logits: bool) -> jax.Array:
    """How far outputs are from what they were: in mean divergence, or in square."""
    if not logits:
        return 1 - guard.agreement(answer, found)
    wanted, logs = (
        jax.nn.log_softmax(one.astype(jnp.float32)) for one in (answer, found)
    )
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - logs), axis=-1))
