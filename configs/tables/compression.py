"""Smaller models at equal FLOPs, before and after they are tuned again.

python -m experiments.tables compression --data-dir DIR
"""

from experiments.compression_config import CompressionConfig
from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Smaller models",
        claim="What activations say is worth most before tuning; then all are near.",
        config=CompressionConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            epochs=5 if scale == "cpu" else 20,
        ),
        contenders=(
            "whole",
            "spectral",
            "factors",
            "unrepaired",
            "l1",
            "magnitude",
            "random",
            "svd",
            "spectral:flops=0.25",
            "factors:flops=0.25",
            "l1:flops=0.25",
            "svd:flops=0.25",
        ),
        metrics=("accuracy", "before", "flops", "latency"),
        trial_length=1.0,
        caption=(
            "Fashion-MNIST, an MLP 512×2 of 5 epochs of Adam, cut and tuned for one "
            "more; `before` is the accuracy before that, latency that of a pass of 256 "
            "images; `factors` splits kernels by what their layers see, `unrepaired` "
            "has our neurons and widths, and no least squares."
        ),
    )
