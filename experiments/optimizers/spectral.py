"""The optimizers of `dsbp_jax`, one class for each of its transformations."""

import dataclasses
from typing import Any, ClassVar, Literal

import optax

import dsbp_jax
from experiments.optimizers.optimizer import (
    Blocks,
    CountOrZero,
    Follows,
    FollowsEither,
    OptionalShare,
    Period,
    Positive,
    Share,
    Source,
    Strength,
    Uses,
    kernels,
)
from experiments.optimizers.published import Momentum, Sam
from experiments.study.config import LATER


@dataclasses.dataclass(frozen=True, kw_only=True)
class EigenSam(Sam):
    """SAM along the top eigenvector of the Hessian."""

    sam = "eigen"
    chooses = True

    def perturbed(self, inner, uses):
        """See `Optimizer`."""
        return super().perturbed(inner, uses, refresh_every=None)


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

    num_blocks: Blocks = dataclasses.field(default=2, metadata=LATER)
    """Krylov blocks of a refresh of the projection's bases."""

    def _transform(self, rate, uses):
        return dsbp_jax.dsbp(
            rate,
            self.rank,
            residual=self.residual,
            momentum=self.momentum,
            decay=self.decay,
            energy=self.energy,
            num_blocks=self.num_blocks,
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
class SubspaceAdam(Follows):
    """Adam through `dsbp_jax.spectral_subspace`."""

    residual: Share = 0.1
    """Share of the gradient outside of the basis that is kept."""

    side: Literal["smaller", "input", "output"] = "input"
    """Of the bases."""

    refresh_every: Period = 200

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def _inner(self, rate: optax.Schedule, uses: Uses) -> Any:
        """What moves the coordinates."""
        del uses
        return optax.adam(rate, *self.betas)

    def _transform(self, rate, uses):
        return dsbp_jax.spectral_subspace(
            self._inner(rate, uses),
            self.rank,
            side=self.side,
            residual=self.residual,
            refresh_every=self.refresh_every,
            layout=uses.layout,
            betas=self.betas,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sumo(SubspaceAdam, Momentum):
    """Momentum inside of the eigenspace, all of its singular values made alike there.

    As SUMO (arXiv 2505.24749): exact, and nothing outside of the eigenspace.
    """

    decoupled = True
    betas = (0.9, 0.95)  # of the AdamW of all other leaves

    learning_rate: Positive = 3e-3
    momentum: Share = 0.95
    residual: Share = 0.0

    def _inner(self, rate, uses):
        return dsbp_jax.spectral_muon(
            rate,
            self.rank,
            momentum=self.momentum,
            damping=0.0,
            betas=self.betas,
            hidden=uses.roles and dict(uses.roles),  # coordinates go by their shapes
        )

    def _transform(self, rate, uses):
        strength = self.weight_decay
        decay = optax.add_decayed_weights(lambda step: -strength * rate(step), kernels)
        inside = super()._transform(rate, uses)
        return optax.chain(inside, decay) if strength else inside


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
