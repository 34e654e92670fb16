"""Where a training step has its gradient from: plain, spectral, or in coordinates.

Each of `GRADIENTS` builds a `Source`: pure functions of one form. What the optimizer
moves are the parameters themselves, or coordinates that stand for them; beside them a
source may carry arrays of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax

import dsbp_jax
from experiments import checks
from experiments.optimizer_table import Count, CountOrZero, check

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Exact gradients."""

    def refuses(self, optimizer: Any) -> bool:
        """Whether an optimizer cannot have its gradients from here."""
        del optimizer
        return False

    def build(self, loss: Loss, decay: Any) -> Source:
        """The source.

        Args:
          loss: The loss.
          decay: Peak learning rate times weight decay, of kernels that are decayed
            here; may be traced.
        """
        del decay
        gradient = jax.value_and_grad(loss, has_aux=True)

        def value_and_grad(params: Any, carried: Any, *args: Any) -> Any:
            return *gradient(params, *args), carried

        return Source(
            init=lambda params, *args, key: (params, ()),
            value_and_grad=value_and_grad,
            params=lambda params, carried: params,
        )


def _catch_up(argument: str, value: int | None) -> None:
    """Raises a `ValueError` unless `value` is None, or a period of 2 or more."""
    if value is not None:
        checks.count(argument, value, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Columns(Plain):
    """What sketches and coordinates have."""

    rank: Count = 64
    """Columns of each layer."""

    refresh_every: Count = 10
    """Steps between two refreshes."""

    def __post_init__(self):
        """Checks every value."""
        check(self)
        if self.tracking is not None:
            checks.count("tracking", self.tracking, 0)
            checks.between("tracking", self.tracking, 0, self.rank)

    def rows(self, batch_size: int) -> int:
        """How many examples of a batch a refresh sees."""
        return min(batch_size, max(batch_size // PART, 2 * self.rank))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sketch(_Columns):
    """Sketches of weight gradients: `dsbp_jax.spectral_backprop`."""

    tracking: int | None = None
    """How many of the columns follow the gradient, the others the layers' inputs; by
    default none."""

    random: CountOrZero = 0
    """Random columns besides."""

    catch_up_every: Annotated[int | None, _catch_up] = None
    """Steps after which one is exact and makes up for what the others left out; by
    default none is."""

    def refuses(self, optimizer: Any) -> bool:
        """Sketched gradients have no Hessian: their derivative is not symmetric."""
        return optimizer.sam == "eigen"

    def build(self, loss: Loss, decay: Any) -> Source:
        """The source."""
        del decay
        tracking = self.tracking or 0
        backprop = dsbp_jax.spectral_backprop(
            loss,
            self.rank,
            tracking=tracking,
            random=self.random,
            refresh_every="auto" if tracking else self.refresh_every,
            has_aux=True,
        )

        def init(params: Any, *args: Any, key: jax.Array) -> Any:
            return params, backprop.init(params, *args, key=key)

        def refresh(params: Any, state: Any, opt_state: Any, steps: Any, *args: Any):
            del steps
            return params, backprop.refresh(params, state, *args), opt_state

        return Source(
            init=init,
            value_and_grad=backprop.value_and_grad,
            params=lambda params, state: params,
            catch_up=functools.partial(backprop.catch_up, every=self.catch_up_every)
            if self.catch_up_every
            else None,
            refresh=refresh if tracking else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordinates(_Columns):
    """Kernels held in a few columns: `dsbp_jax.spectral_coordinates`.

    Weight decay is decoupled, as in adamw, and that of the kernels part of a fold.
    """

    tracking: int | None = None
    """How many of the columns follow the gradient, the others the layers' inputs; by
    default half."""

    def refuses(self, optimizer: Any) -> bool:
        """Whether it follows directions of its own."""
        return optimizer.chooses

    def build(self, loss: Loss, decay: Any) -> Source:
        """The source."""
        training = dsbp_jax.spectral_coordinates(
            loss,
            self.rank,
            tracking=self.tracking,
            weight_decay=decay,
            has_aux=True,
        )

        def value_and_grad(coords: Any, frame: Any, *args: Any) -> Any:
            return *training.value_and_grad(coords, frame, *args), frame

        def refresh(coords: Any, frame: Any, opt_state: Any, steps: Any, *args: Any):
            return training.fold(coords, frame, opt_state, *args, steps=steps)

        return Source(training.init, value_and_grad, training.merge, refresh=refresh)


GRADIENTS: dict[str, type[Plain]] = {
    "plain": Plain,
    "spectral": Sketch,
    "coordinates": Coordinates,
}
