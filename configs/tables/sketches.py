"""Momentum through sketched weight gradients against momentum.

python -m experiments.tables sketches --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Momentum through sketched gradients",
        claim="Do sketches save more in time than their missing part costs?",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (2048, 2048)}),
            probe=ProbeConfig(0),
            epochs=2 if scale == "cpu" else 30,
            batch_size=512,
        ),
        contenders=(
            "momentum",
            "momentum+spectral:rank=64,catch_up_every=4",
            "momentum+spectral:rank=128,catch_up_every=4",
        ),
        views=("evaluations", "time"),
        caption="Fashion-MNIST, an MLP 2048×2, 512 images a step.",
    )
