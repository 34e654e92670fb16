"""The optimizers that experiments compare: one small dataclass each, with `build`.

A field is an option; its annotation holds the check of its values. What is a setting of
another optimizer has a name in `NAMED`. What surrounds every optimizer, and the text
that names one with its options, are in `experiments.optimizers`.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import optax

import dsbp_jax
from dsbp_jax.transforms import WHITENED
from experiments import checks, msam, rivals


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
      sam: How the point is perturbed at which it takes its gradient, if at all.
    """

    decoupled: ClassVar[bool] = False
    spectral: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
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
        view = _dense(uses, path, leaf)
        return view and make(view.input_axes, view.output_axes)

    return functools.partial(dsbp_jax.layers.map_paths, axes)


def _dense(uses: Uses, path: str, leaf: Any) -> dsbp_jax.MatrixView | None:
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
class Sgd(Optimizer):
    """Gradient descent."""

    learning_rate: Positive = 0.1

    def _transform(self, rate, uses):
        return optax.sgd(rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """Gradient descent with momentum."""

    learning_rate: Positive = 0.05

    momentum: Share = 0.9
    """Of the steps."""

    def _transform(self, rate, uses):
        return optax.sgd(rate, momentum=self.momentum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sam(Momentum):
    """Momentum, the gradient taken where the loss rises steepest."""

    sam = "full"

    rho: Strength = 0.05
    """Radius of the perturbation."""

    def perturbed(self, inner, uses, **options):
        """See `Optimizer`."""
        return dsbp_jax.spectral_sam(
            inner, self.rho, mode=self.sam, layout=uses.layout, **options
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EigenSam(Sam):
    """SAM along the top eigenvector of the Hessian."""

    sam = "eigen"
    chooses = True

    def perturbed(self, inner, uses):
        """See `Optimizer`."""
        return super().perturbed(inner, uses, refresh_every=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Msam(Momentum):
    """Momentum that is its own perturbation (`experiments.msam`)."""

    chooses = True  # its perturbation would have to follow a fold

    rho: Strength = 0.05
    """Norm of the perturbation."""

    def _transform(self, rate, uses):
        return msam.msam(rate, self.momentum, self.rho)

    def settled(self, state, params):
        """See `Optimizer`."""
        return msam.settled(state, params)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralSam(Sam, FollowsEither):
    """SAM inside of each layer's eigenspace."""

    sam = "spectral"

    def perturbed(self, inner, uses):
        """See `Optimizer`."""
        return super().perturbed(inner, uses, rank=self.rank, **self._bases())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dsbp(Momentum, FollowsEither):
    """`dsbp_jax.dsbp`."""

    residual: Share = 0.1
    """Share of the gradient outside of the basis that is kept; 1 is momentum."""

    decay: Strength = 0.0
    """Strength of the decay of the leading direction."""

    energy: OptionalShare = None
    """Use only the leading columns that hold this share of the trace."""

    def _transform(self, rate, uses):
        return dsbp_jax.dsbp(
            rate,
            self.rank,
            residual=self.residual,
            momentum=self.momentum,
            decay=self.decay,
            energy=self.energy,
            layout=uses.layout,
            **self._bases(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DsbpSam(Dsbp, Sam):
    """`Dsbp`, the gradient taken where it rises steepest inside of its bases."""

    sam = "spectral"

    def perturbed(self, inner, uses):
        """See `Optimizer`."""
        return super().perturbed(inner, uses, **self._bases())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DsbpLie(Momentum, Follows):
    """`dsbp_jax.lie_rotation`."""

    learning_rate: Positive = 0.01

    radial: Share = 1.0
    """Share of what changes singular values; 0 keeps them."""

    @property
    def reads(self):
        """See `Optimizer`."""
        return "output"

    def _transform(self, rate, uses):
        return dsbp_jax.lie_rotation(
            rate,
            rank=self.rank,
            momentum=self.momentum,
            radial=self.radial,
            refresh_every=self.refresh_every,
            layout=uses.layout,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam, its weight decay part of the gradient."""

    b2: Share = 0.999
    """Of the second moment."""

    def _transform(self, rate, uses):
        return optax.adam(rate, b2=self.b2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam, its weight decay decoupled."""

    decoupled = True

    def _transform(self, rate, uses):
        decay = self.weight_decay
        return optax.adamw(rate, b2=self.b2, weight_decay=decay, mask=kernels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Momentum, AdamW):
    """`optax.contrib.muon`, its updates as large as Adam's: one rate fits all."""

    learning_rate: Positive = 1e-3

    decays_all: Annotated[bool, checks.flag] = False
    """Whether all leaves of its Adam decay: it has no mask of its own."""

    def _transform(self, rate, uses):
        return optax.contrib.muon(
            rate,
            beta=self.momentum,
            weight_decay=self.weight_decay,
            adam_b2=self.b2,
            adam_weight_decay=self.weight_decay if self.decays_all else 0.0,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimension_numbers(
                optax.contrib.MuonDimensionNumbers, uses
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kaon(Momentum, AdamW):
    """`rivals.kaon` for the matrices that Muon would take, AdamW for the rest."""

    learning_rate: Positive = 1e-3

    def _transform(self, rate, uses):
        momentum = optax.trace(self.momentum, nesterov=True)
        return self._beside_adamw(rate, uses, optax.chain(momentum, rivals.kaon()))

    def _beside_adamw(self, rate: optax.Schedule, uses: Uses, transform: Any) -> Any:
        def on_matrix(path: str, leaf: Any) -> str:
            return "adamw" if _dense(uses, path, leaf) is None else "matrix"

        matrix = rivals.on_matrices(transform, uses.layout)
        parts = {
            "matrix": self._decaying(rate, matrix),
            "adamw": AdamW._transform(self, rate, uses),
        }
        labels = functools.partial(dsbp_jax.layers.map_paths, on_matrix)
        return optax.partition(parts, labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soap(Kaon):
    """`rivals.scale_by_soap` for the same matrices, AdamW for the rest."""

    learning_rate: Positive = 3e-3

    refresh_every: Count = 10
    """Steps between two refreshes."""

    def _transform(self, rate, uses):
        soap = rivals.scale_by_soap(every=self.refresh_every)
        return self._beside_adamw(rate, uses, soap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Galore(Optimizer):
    """`optax.contrib.galore`."""

    decoupled = True
    chooses = True

    rank: Count = 64
    """Columns of each basis."""

    refresh_every: Count = 10
    """Steps between two of its decompositions; its own default is 200."""

    def _transform(self, rate, uses):
        return optax.contrib.galore(
            rate,
            rank=self.rank,
            update_proj_gap=self.refresh_every,
            weight_decay=self.weight_decay,
            mask=kernels,
            weight_dimension_numbers=dimension_numbers(
                optax.contrib.GaLoreDimensionNumbers, Uses(uses.layout)
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubspaceAdam(Follows):
    """Adam through `dsbp_jax.spectral_subspace`."""

    residual: Share = 0.1
    """Share of the gradient outside of the basis that is kept."""

    side: Literal["smaller", "input", "output"] = "input"
    """Of the bases."""

    refresh_every: Period = 200

    def _transform(self, rate, uses):
        return dsbp_jax.spectral_subspace(
            optax.adam(rate),
            self.rank,
            side=self.side,
            residual=self.residual,
            refresh_every=self.refresh_every,
            layout=uses.layout,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralMuon(Momentum, Follows):
    """`dsbp_jax.spectral_muon`."""

    decoupled = True
    chooses = False  # its directions are those of its own momentum

    learning_rate: Positive = 3e-3
    rank: CountOrZero = 64
    refresh_every: Period = 1
    momentum: Share = 0.95

    power: float = 0.5
    """Of the spectrum that is divided by; half is Muon's."""

    residual: Share = 1.0
    """Share that is kept of what lies outside of the basis."""

    damping: Strength = 0.0
    """Relative to the mean eigenvalue."""

    scale: Literal["rms", "spectral", "update"] = "rms"
    """Size of a step: Adam's, Muon's, or that of the momentum."""

    def _transform(self, rate, uses):
        return dsbp_jax.spectral_muon(
            rate,
            self.rank,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            power=self.power,
            residual=self.residual,
            damping=self.damping,
            scale=self.scale,
            refresh_every=self.refresh_every,
            hidden=uses.roles,
            layout=uses.layout,
            sizes=uses.sizes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhitenedMomentum(Momentum, Follows):
    """Momentum, whitened by its own spectrum."""

    decoupled = True
    chooses = False

    def _transform(self, rate, uses):
        trace, whitening = optax.trace(self.momentum), self._whitening(uses, "gradient")
        return self._decaying(rate, trace, whitening)

    def _whitening(self, uses: Uses, source: Source) -> Any:
        return dsbp_jax.spectral_whitening(
            self.rank,
            source=source,
            scale="update",  # so that momentum's rates fit, and biases too
            refresh_every=self.refresh_every,
            layout=uses.layout,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationWhitening(WhitenedMomentum):
    """Momentum of gradients whitened by the spectrum of what their layer sees."""

    chooses = True

    @property
    def activations(self):
        """See `Optimizer`."""
        return ("inputs",)

    def _transform(self, rate, uses):
        whitening = self._whitening(uses, "activation")
        return self._decaying(rate, whitening, optax.trace(self.momentum))


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "sam": Sam,
    "spectral_sam": SpectralSam,
    "eigen_sam": EigenSam,
    "msam": Msam,
    "adam": Adam,
    "adamw": AdamW,
    "muon": Muon,
    "soap": Soap,
    "kaon": Kaon,
    "galore": Galore,
    "subspace_adam": SubspaceAdam,
    "dsbp": Dsbp,
    "dsbp_sam": DsbpSam,
    "dsbp_lie": DsbpLie,
    "spectral_muon": SpectralMuon,
    "whitened_momentum": WhitenedMomentum,
    "activation_whitening": ActivationWhitening,
}

#: Settings that have a name: of which optimizer, and its options.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    # The rule that the paper prints.
    "dsbp_paper": (
        "dsbp",
        {"source": "activation", "residual": 0.0, "momentum": 0.0, "decay": 1e-4},
    ),
    "spectra": ("spectral_muon", {"rank": 8}),  # 1.5 % of a width of 512
    "low_rank_muon": ("spectral_muon", {"residual": 0.0}),
    "exact_muon": ("spectral_muon", {"rank": 1024}),
    "scaled_muon": ("spectral_muon", {"rank": 0}),
    "frozen_muon": ("spectral_muon", {"refresh_every": None}),
}
