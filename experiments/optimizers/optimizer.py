"""What all optimizers have: their options, how these are checked, and what is built.

A field of a dataclass is an option; its annotation holds the check of its values.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import optax

import dsbp_jax
from dsbp_jax.transforms import WHITENED
from experiments import checks


class Uses(NamedTuple):
    """How the model uses its parameters.

    Attributes:
      layout: The matrix views of its kernels; None where they go by their shapes.
      roles: What each leaf is for; None where every kernel counts as hidden.
      sizes: The kernels behind those that are held in coordinates.
    """

    layout: dsbp_jax.Layout | None = None
    roles: Mapping[str, str] | None = None
    sizes: Mapping[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, roles: dsbp_jax.Roles) -> Self:
        """What `dsbp_jax.roles` says."""
        return cls(roles.layout, roles)

    def in_coordinates(self, frame: dsbp_jax.Frame) -> Self:
        """The same of coordinates in place of the kernels that a frame holds."""
        views = {**(self.layout or {}), **dsbp_jax.backprop.views(frame)}
        return self._replace(
            layout=dsbp_jax.Layout(views), sizes=dsbp_jax.backprop.sizes(frame)
        )


#: Of a model that nothing is known of.
UNKNOWN = Uses()

_share = functools.partial(checks.between, low=0, high=1)
_strength = functools.partial(checks.at_least, low=0)


def _period(argument: str, value: int | None) -> None:
    """Raises a `ValueError` unless `value` is a number of steps, or None for never."""
    if value is not None:
        checks.count(argument, value)


Positive = Annotated[float, checks.positive]
Share = Annotated[float, _share]
OptionalShare = Annotated[float | None, _share]
Strength = Annotated[float, _strength]
Count = Annotated[int, checks.count]
CountOrZero = Annotated[int, functools.partial(checks.count, low=0)]
Blocks = Annotated[int, functools.partial(checks.count, low=2)]
Period = Annotated[int | None, _period]
Source = Literal["gradient", "activation"]
Side = Literal["output", "input", "both"]


def check(options: Any) -> None:
    """Checks the fields of a dataclass by their annotations.

    Raises:
      ValueError: If a value is not accepted.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        plain, *marks = [hint]
        if hasattr(hint, "__metadata__"):
            plain, *marks = typing.get_args(hint)
        kinds = typing.get_args(plain) or (plain,)
        if typing.get_origin(plain) is Literal:
            checks.one_of(field.name, value, kinds)
        elif float in kinds and not (value is None and type(None) in kinds):
            checks.number(field.name, value)
        for mark in marks:
            mark(field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What all optimizers have.

    Attributes:
      decoupled: Whether its own transformation decays weights; else the gradient of
        ½ weight_decay ‖W‖² is added before it.
      spectral: Whether it keeps eigenbases of the layers.
      chooses: Whether it chooses directions of its own, which coordinates have not.
      by_role: Whether it tells hidden matrices from others, by what is known of them.
      sam: How the point is perturbed at which it takes its gradient, if at all.
    """

    decoupled: ClassVar[bool] = False
    spectral: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    by_role: ClassVar[bool] = False
    sam: ClassVar[Literal["full", "spectral", "eigen"] | None] = None

    learning_rate: Positive = 1e-3
    """Peak learning rate."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warmup."""

    warmup: Share = 0.05
    """Part of the steps over which the learning rate rises linearly to its peak."""

    weight_decay: Strength = 0.0
    """Weight decay of the kernels; biases and scales have none."""

    def __post_init__(self):
        """Checks every value."""
        check(self)

    @property
    def evaluations(self) -> int:
        """Gradient evaluations of a step, less what a Hessian costs eigen_sam."""
        return 2 if self.sam else 1

    @property
    def activations(self) -> tuple[str, ...]:
        """The activations that `update` wants of each layer; none for most."""
        return ()

    @property
    def reads(self) -> str | None:
        """The side of which bases are reported, where there are two."""
        return None

    def build(self, rate: optax.Schedule, uses: Uses) -> optax.GradientTransformation:
        """The transformation, for a schedule and what is known of the model."""
        transform = self._transform(rate, uses)
        if self.decoupled or not self.weight_decay:
            return transform
        decay = optax.add_decayed_weights(self.weight_decay, mask=kernels)
        return optax.chain(decay, transform)

    def perturbed(
        self, inner: optax.GradientTransformation, uses: Uses
    ) -> optax.GradientTransformation:
        """The transformation with its perturbation around it, where it has one."""
        del uses
        return inner

    def settled(self, state: Any, params: Any) -> Any:
        """The parameters to evaluate, of those that training holds."""
        del state
        return params

    def _transform(self, rate: optax.Schedule, uses: Uses) -> Any:
        raise NotImplementedError

    def _decaying(self, rate: optax.Schedule, *transforms: Any) -> Any:
        """Transformations, weight decay outside of them, and the learning rate."""
        decay = optax.add_decayed_weights(self.weight_decay, mask=kernels)
        decays = [decay] if self.weight_decay else []
        return optax.chain(*transforms, *decays, optax.scale_by_learning_rate(rate))


def kernels(params: Any, held: Collection[str] = ()) -> Any:
    """The mask of weight decay: True for matrices, False for biases and scales.

    Args:
      params: The parameters.
      held: Paths of matrices that are left out.

    Returns:
      A tree of bools.
    """
    return dsbp_jax.layers.map_paths(
        lambda path, leaf: leaf.ndim > 1 and path not in held, params
    )


def dimension_numbers(
    make: Callable[..., Any], uses: Uses
) -> Callable[[Any], Any] | None:
    """How the model uses its kernels, in the terms of `optax.contrib`.

    Without a layout these optimizers take the leaves with two axes. Convolutions and
    stacks stay with their Adam; so does what is not hidden, where roles are known.
    """
    if uses.layout is None:
        return None

    def axes(path: str, leaf: Any) -> Any:
        view = dense_view(uses, path, leaf)
        return view and make(view.input_axes, view.output_axes)

    return functools.partial(dsbp_jax.layers.map_paths, axes)


def dense_view(uses: Uses, path: str, leaf: Any) -> dsbp_jax.MatrixView | None:
    """The view of a hidden leaf that is one matrix without a window."""
    if uses.roles is not None and uses.roles.get(path) not in WHITENED:
        return None
    if leaf.ndim == 2:  # a kernel, or the coordinates of any
        return dsbp_jax.MatrixView((0,), (1,))
    view = uses.layout and uses.layout.get(path)
    if view is None or view.batch_axes or view.window_axes(leaf.ndim):
        return None
    return view


@dataclasses.dataclass(frozen=True, kw_only=True)
class Follows(Optimizer):
    """What all optimizers have that keep eigenbases."""

    spectral = True
    chooses = True

    rank: Count = 64
    """Columns of each basis."""

    refresh_every: Period = 10
    """Steps between two refreshes of a basis; None keeps the first one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowsEither(Follows):
    """What they have whose bases follow gradients or activations."""

    source: Source = "gradient"
    """What the bases follow."""

    side: Side = "output"
    """Which side of a kernel is projected, or perturbed."""

    @property
    def activations(self):
        """See `Optimizer`."""
        if self.source == "gradient":
            return ()
        sides = {"input": ("inputs",), "output": ("outputs",)}
        return sides.get(self.side, ("inputs", "outputs"))

    @property
    def reads(self):
        """See `Optimizer`."""
        return "output" if self.side == "both" else None

    def _bases(self) -> dict[str, Any]:
        names = ("source", "side", "refresh_every")
        return {name: getattr(self, name) for name in names}
