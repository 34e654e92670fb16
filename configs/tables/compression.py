"""Smaller models at equal FLOPs, before and after they are tuned again.

python -m experiments.tables compression --data-dir DIR
"""

from experiments.compression_config import CompressionConfig
from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table

CUTS = ("spectral", "unrepaired", "l1", "magnitude", "random", "svd")


def table(scale: str) -> Table:
    """The table."""
    shares = (0.5,) if scale == "smoke" else (0.5, 0.25)
    return Table(
        title="Smaller models",
        claim="What activations say is worth most before tuning, and after small cuts.",
        config=CompressionConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            epochs=5 if scale == "cpu" else 20,
        ),
        contenders=(
            "whole",
            *(f"{method}:flops={share}" for share in shares for method in CUTS),
        ),
        metrics=("accuracy", "before", "flops", "latency"),
        tune=() if scale == "cpu" else ("rate",),
        caption=(
            "Fashion-MNIST, an MLP 512×2 of 5 epochs of Adam, cut and tuned for one "
            "more; `before` is the accuracy before that, latency that of a pass of 256 "
            "images; `unrepaired` has our neurons and widths, and no least squares."
        ),
    )
