"""A smaller Vision Transformer: inner widths, and the features of each head.

python -m experiments.tables compression_vit --data-dir DIR
"""

from experiments.compression_config import CompressionConfig
from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Smaller models: a Vision Transformer",
        claim="Inner widths and heads: what is lost before and after tuning?",
        config=CompressionConfig(
            data=DataConfig("cifar10_balanced"),
            model=ModelConfig("vit", {"patch": 4, "dim": 64, "depth": 3, "heads": 4}),
            epochs=7 if scale == "cpu" else 30,
        ),
        contenders=("whole", "spectral", "unrepaired", "l1", "random"),
        metrics=("accuracy", "before", "flops", "latency"),
        seeds=3,
        caption=(
            "2,000 images a class of CIFAR-10, a ViT of three blocks, 64 wide, 7 "
            "epochs of Adam, cut to half of its FLOPs and tuned for one more; `before` "
            "is the accuracy before that, latency that of a pass of 256 images; "
            "`unrepaired` has our features and widths, and no least squares."
        ),
    )
