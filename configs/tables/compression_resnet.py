"""A smaller ResNet at half of its FLOPs: channels under batch norm and residuals.

python -m experiments.tables compression_resnet --data-dir DIR
"""

from experiments.compression_config import CompressionConfig
from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Smaller models: a ResNet",
        claim="Channels under batch norm: what is lost before and after tuning?",
        config=CompressionConfig(
            data=DataConfig("cifar10_balanced"),
            model=ModelConfig("resnet18", {"width": 8}),
            epochs=10 if scale == "cpu" else 30,
            tune_epochs=2.0,
            multiple_of=2,
        ),
        contenders=("whole", "spectral", "unrepaired", "l1", "magnitude", "random"),
        metrics=("accuracy", "before", "flops", "latency"),
        seeds=3,
        caption=(
            "2,000 images a class of CIFAR-10, a ResNet-18 of 8 to 64 channels, 10 "
            "epochs of Adam, cut to half of its FLOPs and tuned for two more; `before` "
            "is the accuracy before that: cut models first took the statistics of "
            "batch normalisation again, from 4,000 images and no labels; latency is "
            "that of a pass of 256 images; `unrepaired` has our channels and widths, "
            "and no least squares."
        ),
    )
