"""Optimizers that others published, as they are compared here."""

import dataclasses
import functools
from typing import Annotated, Any

import optax

import dsbp_jax
from experiments import checks
from experiments.optimizers import msam, rivals
from experiments.optimizers.optimizer import (
    Count,
    Optimizer,
    Positive,
    Share,
    Strength,
    Uses,
    dense_view,
    dimension_numbers,
    kernels,
)


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
class Msam(Momentum):
    """Momentum that is its own perturbation (`experiments.optimizers.msam`)."""

    chooses = True  # its perturbation would have to follow a fold

    rho: Strength = 0.05
    """Norm of the perturbation."""

    def _transform(self, rate, uses):
        return msam.msam(rate, self.momentum, self.rho)

    def settled(self, state, params):
        """See `Optimizer`."""
        return msam.settled(state, params)


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

    by_role = True

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

    by_role = True

    learning_rate: Positive = 1e-3

    def _transform(self, rate, uses):
        momentum = optax.trace(self.momentum, nesterov=True)
        return self._beside_adamw(rate, uses, optax.chain(momentum, rivals.kaon()))

    def _beside_adamw(self, rate: optax.Schedule, uses: Uses, transform: Any) -> Any:
        def on_matrix(path: str, leaf: Any) -> str:
            return "adamw" if dense_view(uses, path, leaf) is None else "matrix"

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
