"""The table of optimizers: how each is built, tuned, and paid for.

An entry of `OPTIMIZERS` is a function from a config and a schedule to an Optax
transformation, with its default learning rate, a grid for tuning, and the cost of a
step. The configs themselves, and what surrounds every optimizer, are in
`experiments.optimizers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import optax

import dsbp_jax
from experiments import rivals


class Uses(NamedTuple):
    """How the model uses its parameters.

    Attributes:
      layout: The matrix views of its kernels; None where they go by their shapes.
      roles: What each leaf is for; None where every kernel counts as hidden.
    """

    layout: dsbp_jax.Layout | None = None
    roles: Mapping[str, str] | None = None


#: Of a model that nothing is known of.
UNKNOWN = Uses()

# From an `OptimizerConfig`, a schedule and what is known of the model.
Build = Callable[[Any, optax.Schedule, Uses], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An entry of the table.

    Attributes:
      build: Builds the transformation, for a config and a schedule.
      learning_rate: The peak learning rate where none is chosen.
      grid: The learning rates to try when tuning, ascending.
      sam: How the point is perturbed at which it takes its gradient, if at all.
      spectral: Whether it keeps eigenbases of the layers.
      follows: Whether these may follow activations.
      activations: Those that `update` wants always.
      chooses: Whether it chooses directions of its own, which coordinates have not.
    """

    build: Build
    learning_rate: float
    grid: tuple[float, ...]
    sam: Literal["full", "spectral", "eigen"] | None = None
    spectral: bool = False
    follows: bool = False
    activations: tuple[str, ...] = ()
    chooses: bool = False

    @property
    def evaluations(self) -> int:
        """Gradient evaluations in one step.

        The Hessian of eigen_sam, a fifth of an evaluation more, is not counted.
        """
        return 2 if self.sam else 1


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


def _with_decay(
    config: Any, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adds the gradient of ½ weight_decay ‖W‖² before the optimizer."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    return optax.chain(decay, optimizer) if config.weight_decay else optimizer


def _sgd(config, schedule, uses):
    del uses
    return _with_decay(config, optax.sgd(schedule))


def _momentum(config, schedule, uses):
    del uses
    return _with_decay(config, optax.sgd(schedule, momentum=config.momentum))


def _adam(config, schedule, uses):
    del uses
    return _with_decay(config, optax.adam(schedule))


def _adamw(config, schedule, uses):
    del uses
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=kernels)


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
    if uses.roles is not None and uses.roles.get(path) not in ("hidden", "first"):
        return None
    if leaf.ndim == 2:  # a kernel, or the coordinates of any
        return dsbp_jax.MatrixView((0,), (1,))
    view = uses.layout and uses.layout.get(path)
    if view is None or view.batch_axes or view.window_axes(leaf.ndim):
        return None
    return view


def _muon(config, schedule, uses):
    return optax.contrib.muon(
        schedule,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        consistent_rms=0.2,  # updates as large as Adam's, so one rate fits both parts
        muon_weight_dimension_numbers=dimension_numbers(
            optax.contrib.MuonDimensionNumbers, uses
        ),
    )


def _beside_adamw(config, schedule, uses, transform):
    """A transformation of the matrices that Muon would take, AdamW for the rest."""

    def on_matrix(path: str, leaf: Any) -> str:
        return "adamw" if _dense(uses, path, leaf) is None else "matrix"

    parts = {
        "matrix": _decoupled(
            config, schedule, rivals.on_matrices(transform, uses.layout)
        ),
        "adamw": _adamw(config, schedule, uses),
    }
    return optax.partition(
        parts, functools.partial(dsbp_jax.layers.map_paths, on_matrix)
    )


def _soap(config, schedule, uses):
    soap = rivals.scale_by_soap(every=config.refresh_every)
    return _beside_adamw(config, schedule, uses, soap)


def _kaon(config, schedule, uses):
    momentum = optax.trace(config.momentum, nesterov=True)
    return _beside_adamw(config, schedule, uses, optax.chain(momentum, rivals.kaon()))


def _galore(config, schedule, uses):
    return optax.contrib.galore(
        schedule,
        rank=config.rank,
        update_proj_gap=config.refresh_every,
        weight_decay=config.weight_decay,
        mask=kernels,
        weight_dimension_numbers=dimension_numbers(
            optax.contrib.GaLoreDimensionNumbers, Uses(uses.layout)
        ),
    )


def _dsbp(config, schedule, uses):
    optimizer = dsbp_jax.dsbp(
        schedule,
        config.rank,
        source=config.source,
        side=config.side,
        residual=config.residual,
        momentum=config.momentum,
        decay=config.decay,
        refresh_every=config.refresh_every,
        layout=uses.layout,
    )
    return _with_decay(config, optimizer)


def _subspace_adam(config, schedule, uses):
    optimizer = dsbp_jax.spectral_subspace(
        optax.adam(schedule),
        config.rank,
        residual=config.residual,
        refresh_every=config.refresh_every,
        layout=uses.layout,
    )
    return _with_decay(config, optimizer)


def _spectral_muon(config, schedule, uses, **options):
    return dsbp_jax.spectral_muon(
        schedule,
        options.pop("rank", config.rank),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        refresh_every=config.refresh_every,
        hidden=uses.roles,
        layout=uses.layout,
        **options,
    )


def _whitened_momentum(config, schedule, uses):
    whitening = dsbp_jax.spectral_whitening(
        config.rank,
        scale="update",  # so that momentum's rates fit, and biases too
        refresh_every=config.refresh_every,
        layout=uses.layout,
    )
    return _decoupled(config, schedule, optax.trace(config.momentum), whitening)


def _activation_whitening(config, schedule, uses):
    whitening = dsbp_jax.spectral_whitening(
        config.rank,
        source="activation",
        scale="update",
        refresh_every=config.refresh_every,
        layout=uses.layout,
    )
    return _decoupled(config, schedule, whitening, optax.trace(config.momentum))


def _decoupled(config, schedule, *transforms):
    """Transformations, weight decay outside of them, and the learning rate."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    decays = [decay] if config.weight_decay else []
    return optax.chain(*transforms, *decays, optax.scale_by_learning_rate(schedule))


def _dsbp_lie(config, schedule, uses):
    optimizer = dsbp_jax.lie_rotation(
        schedule,
        rank=config.rank,
        momentum=config.momentum,
        radial=config.radial,
        refresh_every=config.refresh_every,
        layout=uses.layout,
    )
    return _with_decay(config, optimizer)


_OF_MOMENTUM = (0.01, 0.03, 0.1, 0.3)
_OF_ADAM = (3e-4, 1e-3, 3e-3, 1e-2)


def _filtered(**options: Any) -> Optimizer:
    """`spectral_muon` with a setting of its filter."""
    build = functools.partial(_spectral_muon, **options)
    return Optimizer(build, 3e-3, _OF_ADAM, spectral=True, chooses=True)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(_sgd, 0.1, (0.03, 0.1, 0.3, 1.0)),
    "momentum": Optimizer(_momentum, 0.05, _OF_MOMENTUM),
    "sam": Optimizer(_momentum, 0.05, _OF_MOMENTUM, sam="full"),
    "spectral_sam": Optimizer(
        _momentum,
        0.05,
        _OF_MOMENTUM,
        sam="spectral",
        spectral=True,
        follows=True,
        chooses=True,
    ),
    "eigen_sam": Optimizer(_momentum, 0.05, _OF_MOMENTUM, sam="eigen", chooses=True),
    "adam": Optimizer(_adam, 1e-3, _OF_ADAM),
    "adamw": Optimizer(_adamw, 1e-3, _OF_ADAM),
    "muon": Optimizer(_muon, 1e-3, _OF_ADAM),
    "soap": Optimizer(_soap, 3e-3, _OF_ADAM),
    "kaon": Optimizer(_kaon, 1e-3, _OF_ADAM),
    "galore": Optimizer(_galore, 1e-3, _OF_ADAM, chooses=True),
    "subspace_adam": Optimizer(
        _subspace_adam, 1e-3, _OF_ADAM, spectral=True, chooses=True
    ),
    "dsbp": Optimizer(
        _dsbp, 0.05, _OF_MOMENTUM, spectral=True, follows=True, chooses=True
    ),
    "dsbp_sam": Optimizer(
        _dsbp,
        0.05,
        _OF_MOMENTUM,
        sam="spectral",
        spectral=True,
        follows=True,
        chooses=True,
    ),
    "dsbp_lie": Optimizer(
        _dsbp_lie, 0.01, (0.001, 0.003, 0.01, 0.03), spectral=True, chooses=True
    ),
    "spectral_muon": _filtered(),
    # Named settings of its filter.
    "spectra": _filtered(rank=8),  # 1.5 % of a width of 512
    "low_rank_muon": _filtered(residual=0.0),
    "whitened_momentum": Optimizer(
        _whitened_momentum, 0.05, _OF_MOMENTUM, spectral=True, chooses=True
    ),
    "activation_whitening": Optimizer(
        _activation_whitening,
        0.05,
        _OF_MOMENTUM,
        spectral=True,
        activations=("inputs",),
        chooses=True,
    ),
}
