"""Where a training step has its gradient from: plain, a sketch, or other variables.

Each of `GRADIENTS` builds a `GradientSource`: pure functions of one form. What the
optimizer moves are the parameters themselves, or coordinates or adapters that stand for
them; beside these a source may carry arrays of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

import dsbp_jax
from experiments import checks
from experiments.optimizers.optimizer import Count, CountOrZero, check

Loss = Callable[..., tuple[jax.Array, Any]]

PART = 4  # a refresh sees this part of a batch


class GradientSource(NamedTuple):
    """Pure functions around one loss `loss(params, *args) -> (value, aux)`.

    Attributes:
      init: `init(params, *args, key=key) -> (moved, carried)`.
      value_and_grad: `value_and_grad(moved, carried, *args) -> ((value, aux), grads,
        carried)`.
      params: `params(moved, carried)`, the parameters.
      catch_up: As `value_and_grad`, for one step in so many; or None.
      refresh: `refresh(moved, carried, *args) -> carried`, for every so many steps, on
        a part of a batch; None where a step does it all.
      observe: As `value_and_grad`, with a fourth result that `fold` wants; or None.
      fold: `fold(moved, carried, opt_state, seen, shrink, key) -> (moved, carried,
        opt_state)`, for every so many steps; kernels are multiplied by `shrink`.
    """

    init: Callable[..., tuple[Any, Any]]
    value_and_grad: Callable[..., tuple[Any, Any, Any]]
    params: Callable[[Any, Any], Any]
    catch_up: Callable[..., tuple[Any, Any, Any]] | None = None
    refresh: Callable[..., Any] | None = None
    observe: Callable[..., tuple[Any, Any, Any, Any]] | None = None
    fold: Callable[..., tuple[Any, Any, Any]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Exact gradients."""

    def refuses(self, optimizer: Any) -> bool:
        """Whether an optimizer cannot have its gradients from here."""
        del optimizer
        return False

    def build(self, loss: Loss) -> GradientSource:
        """The source."""
        gradient = jax.value_and_grad(loss, has_aux=True)

        def value_and_grad(params: Any, carried: Any, *args: Any) -> Any:
            return *gradient(params, *args), carried

        return GradientSource(
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

    def rows(self, batch_size: int) -> int:
        """How many examples of a batch a refresh sees."""
        return min(batch_size, max(batch_size // PART, 2 * self.rank))

    def refuses(self, optimizer: Any) -> bool:
        """Sketched gradients have no Hessian: their derivative is not symmetric."""
        return optimizer.sam == "eigen"

    def build(self, loss: Loss) -> GradientSource:
        """The source."""
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

        return GradientSource(
            init=init,
            value_and_grad=backprop.value_and_grad,
            params=lambda params, state: params,
            catch_up=functools.partial(backprop.catch_up, every=self.catch_up_every)
            if self.catch_up_every
            else None,
            refresh=backprop.refresh if tracking else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordinates(_Columns):
    """Kernels held in a few columns: `dsbp_jax.spectral_coordinates`.

    Weight decay is decoupled, as in adamw, and that of the kernels part of a fold.
    """

    tracking: int | None = None
    """How many of the columns follow the gradient, the others the layers' inputs; by
    default half."""

    random: Annotated[bool, checks.flag] = False
    """Whether the columns follow noise instead, with all else alike: a control."""

    def refuses(self, optimizer: Any) -> bool:
        """Whether it follows directions of its own."""
        return optimizer.chooses

    def build(self, loss: Loss) -> GradientSource:
        """The source."""
        training = dsbp_jax.spectral_coordinates(
            loss, self.rank, tracking=self.tracking, has_aux=True
        )

        def value_and_grad(coords: Any, frame: Any, *args: Any) -> Any:
            return *training.value_and_grad(coords, frame, *args), frame

        def observe(coords: Any, frame: Any, *args: Any) -> Any:
            found = training.value_and_grad(coords, frame, *args, observe=True)
            return *found[:2], frame, found[2]

        def fold(
            coords: Any, frame: Any, opt_state: Any, seen: Any, shrink: Any, key: Any
        ) -> Any:
            if self.random:
                seen = noise(seen, key)
            return training.fold(coords, frame, opt_state, seen, shrink=shrink)

        return GradientSource(
            training.init,
            value_and_grad,
            training.merge,
            observe=observe,
            fold=fold,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Plain):
    """Kernels held as `W₀ + AB`, of which A and B are trained, from the start: LoRA.

    Leaves whose smaller dimension is not above the rank are trained whole. Weight decay
    is that of the factors.
    """

    rank: Count = 64
    """Columns of A."""

    def __post_init__(self):
        """Checks every value."""
        check(self)

    def refuses(self, optimizer: Any) -> bool:
        """Whether it would treat the factors by what is known of kernels."""
        return optimizer.spectral or optimizer.chooses or optimizer.by_role

    def build(self, loss: Loss) -> GradientSource:
        """The source."""
        lora = functools.partial(dsbp_jax.spectral_lora, loss, self.rank)
        trained = lora(start="random")
        gradient = jax.value_and_grad(trained.apply, has_aux=True)
        plain = Plain().build(loss)

        def init(params: Any, *args: Any, key: jax.Array) -> Any:
            leaves = dsbp_jax.layers.leaves_by_path(params)
            held = {
                path
                for path, view in dsbp_jax.layout(loss, params, *args).items()
                if path in leaves  # a second use has a name of its own
                and min(view.matrix_shape(leaves[path].shape)[-2:]) > self.rank
            }
            if not held:
                return params, None
            whole = tuple(path for path in leaves if path not in held)
            return lora(start="random", whole=whole).init(params, *args, key=key)

        def value_and_grad(adapters: Any, frame: Any, *args: Any) -> Any:
            if frame is None:  # nothing is held
                return plain.value_and_grad(adapters, frame, *args)
            return *gradient(adapters, frame, *args), frame

        def merge(adapters: Any, frame: Any) -> Any:
            return adapters if frame is None else trained.merge(adapters, frame)

        return GradientSource(init, value_and_grad, merge)


def noise(tree: Any, key: jax.Array) -> Any:
    """Normal numbers in the place of all that are real."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        jax.random.normal(jax.random.fold_in(key, place), leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for place, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


GRADIENTS: dict[str, type[Plain]] = {
    "plain": Plain,
    "spectral": Sketch,
    "coordinates": Coordinates,
    "lora": Lora,
}
