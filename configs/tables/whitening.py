"""Momentum divided by its spectrum, against AdamW and Muon, on images.

python -m experiments.tables whitening --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Dividing by the spectrum, on images",
        claim="Whitening with few columns is between AdamW and Muon.",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            probe=ProbeConfig(0),
            epochs=2 if scale == "cpu" else 10,
            batch_size=128,
        ),
        contenders=(
            "adamw",
            "muon:momentum=0.95",
            "spectral_muon",
            "spectral_muon:refresh_every=4",
            "low_rank_muon",
        ),
        metrics=("loss",) if scale == "cpu" else ("loss", "accuracy"),
        views=("evaluations", "loss"),
        tune=("rate", "decay"),
        caption="Fashion-MNIST, an MLP 512×2; rates and decays are each column's own.",
    )
