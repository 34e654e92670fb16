"""The optimizers by the names that contenders have."""

from typing import Any

from experiments.optimizers import published, spectral
from experiments.optimizers.optimizer import Optimizer

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": published.Sgd,
    "momentum": published.Momentum,
    "sam": published.Sam,
    "spectral_sam": spectral.SpectralSam,
    "eigen_sam": spectral.EigenSam,
    "msam": published.Msam,
    "adam": published.Adam,
    "adamw": published.AdamW,
    "muon": published.Muon,
    "soap": published.Soap,
    "kaon": published.Kaon,
    "galore": published.Galore,
    "subspace_adam": spectral.SubspaceAdam,
    "sumo": spectral.Sumo,
    "dsbp": spectral.Dsbp,
    "dsbp_sam": spectral.DsbpSam,
    "dsbp_lie": spectral.DsbpLie,
    "spectral_muon": spectral.SpectralMuon,
    "whitened_momentum": spectral.WhitenedMomentum,
    "activation_whitening": spectral.ActivationWhitening,
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
