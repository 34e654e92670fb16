"""Momentum divided by its spectrum, over many passes.

python -m experiments.tables whitening_long --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Dividing by the spectrum, many passes",
        claim="Over many passes, with decay tuned, is whitening still no worse?",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            probe=ProbeConfig(0),
            epochs=10 if scale == "cpu" else 30,
            batch_size=128,
        ),
        contenders=("adamw", "spectral_muon", "spectral_muon:rank=16"),
        metrics=("accuracy", "loss"),
        views=("evaluations", "loss"),
        tune=("rate", "decay"),
        caption="Fashion-MNIST, an MLP 512×2; rates and decays are each column's own.",
    )
