"""Where a training step has its gradient from: plain, spectral, or in coordinates.

Each `Source` is a set of pure functions of one form. What the optimizer moves are the
parameters themselves, or coordinates that stand for them; beside them a source may
carry arrays of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import dsbp_jax
from experiments.optimizers import OptimizerConfig

Loss = Callable[..., tuple[jax.Array, Any]]

PART = 4  # a refresh sees this part of a batch


class Source(NamedTuple):
    """Pure functions around one loss `loss(params, *args) -> (value, aux)`.

    Attributes:
      init: `init(params, *args, key=key) -> (moved, carried)`.
      value_and_grad: `value_and_grad(moved, carried, *args) -> ((value, aux), grads,
        carried)`.
      params: `params(moved, carried)`, the parameters.
      catch_up: As `value_and_grad`, for one step in so many; or None.
      refresh: `refresh(moved, carried, opt_state, steps, *args) -> (moved, carried,
        opt_state)`, for every so many steps; None where a step does it all.
    """

    init: Callable[..., tuple[Any, Any]]
    value_and_grad: Callable[..., tuple[Any, Any, Any]]
    params: Callable[[Any, Any], Any]
    catch_up: Callable[..., tuple[Any, Any, Any]] | None = None
    refresh: Callable[..., tuple[Any, Any, Any]] | None = None


def build(config: OptimizerConfig, loss: Loss, peak: float | jax.Array) -> Source:
    """The source that a config names.

    Args:
      config: The optimizer.
      loss: The loss.
      peak: Its peak learning rate; may be traced.

    Returns:
      The source.
    """
    return {"plain": _plain, "spectral": _spectral, "coordinates": _coordinates}[
        config.backprop
    ](config, loss, peak)


def rows_of_refresh(config: OptimizerConfig, batch_size: int) -> int:
    """How many examples of a batch a refresh sees."""
    return min(batch_size, max(batch_size // PART, 2 * config.rank))


def _plain(config: OptimizerConfig, loss: Loss, peak: Any) -> Source:
    del config, peak
    gradient = jax.value_and_grad(loss, has_aux=True)

    def value_and_grad(params: Any, carried: Any, *args: Any) -> tuple[Any, Any, Any]:
        return *gradient(params, *args), carried

    return Source(
        init=lambda params, *args, key: (params, ()),
        value_and_grad=value_and_grad,
        params=lambda params, carried: params,
    )


def _spectral(config: OptimizerConfig, loss: Loss, peak: Any) -> Source:
    del peak
    tracking = config.tracking or 0
    backprop = dsbp_jax.spectral_backprop(
        loss,
        config.rank,
        tracking=tracking,
        random=config.random,
        refresh_every="auto" if tracking else config.refresh_every,
        has_aux=True,
    )

    def refresh(params: Any, state: Any, opt_state: Any, steps: Any, *args: Any) -> Any:
        del steps
        return params, backprop.refresh(params, state, *args), opt_state

    return Source(
        init=lambda params, *args, key: (params, backprop.init(params, *args, key=key)),
        value_and_grad=backprop.value_and_grad,
        params=lambda params, state: params,
        catch_up=functools.partial(backprop.catch_up, every=config.catch_up_every)
        if config.catch_up_every
        else None,
        refresh=refresh if tracking else None,
    )


def _coordinates(config: OptimizerConfig, loss: Loss, peak: Any) -> Source:
    training = dsbp_jax.spectral_coordinates(
        loss,
        config.rank,
        tracking=config.tracking,
        weight_decay=peak * config.weight_decay if config.weight_decay else 0.0,
        has_aux=True,
    )

    def value_and_grad(coords: Any, frame: Any, *args: Any) -> tuple[Any, Any, Any]:
        return *training.value_and_grad(coords, frame, *args), frame

    def refresh(coords: Any, frame: Any, opt_state: Any, steps: Any, *args: Any) -> Any:
        return training.fold(coords, frame, opt_state, *args, steps=steps)

    return Source(training.init, value_and_grad, training.merge, refresh=refresh)
