"""Momentum divided by its spectrum, where a step is a large product.

python -m experiments.tables whitening_wide --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Dividing by the spectrum, wide layers",
        claim="Where products take most of a step, fewer steps are less time.",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (1024, 1024)}),
            probe=ProbeConfig(0),
            epochs=3 if scale == "cpu" else 10,
            batch_size=512,
        ),
        contenders=("adamw", "spectral_muon", "spectral_muon:refresh_every=4"),
        metrics=("loss",),
        views=("evaluations", "loss"),
        tune=("rate", "decay"),
        caption=(
            "Fashion-MNIST, an MLP 1024×2, 512 images a step. Muon is in the table of "
            "narrower layers: here its step would take five times as long."
        ),
    )
