"""A smaller Vision Transformer: inner widths, and the features of each head.

python -m experiments.tables compression_vit --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("compression_resnet", scale)
    return dataclasses.replace(
        first,
        title="Smaller models: a Vision Transformer",
        claim="Inner widths and heads: what is lost before and after tuning?",
        config=dataclasses.replace(
            first.config,
            model=ModelConfig("vit", {"patch": 4, "dim": 64, "depth": 3, "heads": 4}),
            epochs=4 if scale == "cpu" else 30,
            tune_epochs=1.0,
            multiple_of=8,
        ),
        seeds=5,
        caption=(
            "2,000 images a class of CIFAR-10, a ViT of three blocks, 64 wide, 4 "
            "epochs of Adam, cut to half of its FLOPs and tuned for one more; `before` "
            "is the accuracy before that, latency that of a pass of 256 images; "
            "`unrepaired` has our features and widths, and no least squares."
        ),
    )
