"""Coordinates with Adam and with whitening, by columns, against both in full.

python -m experiments.tables coordinates_whitened --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Coordinates by columns, with Adam and with whitening",
        claim="Are few columns enough, and does it matter what they follow?",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (1024, 1024)}),
            probe=ProbeConfig(0),
            epochs=3 if scale == "cpu" else 10,
            batch_size=512,
        ),
        contenders=(
            "adamw",
            "spectral_muon",
            "adamw+coordinates:rank=64",
            "adamw+coordinates:rank=128",
            "adamw+coordinates:rank=128,random=True",
            "spectral_muon+coordinates:rank=64",
            "spectral_muon+coordinates:rank=128",
            "spectral_muon+coordinates:rank=128,random=True",
        ),
        metrics=("loss",),
        tune=("rate", "decay"),
        caption=(
            "Fashion-MNIST, an MLP 1024×2, 512 images a step; columns are renewed "
            "every 10 steps, `random` ones follow noise. With 256 columns no layer of "
            "this width is held: a step would not be cheaper."
        ),
    )
