"""Optimizers and their minima on chest X-rays.

python -m experiments.tables pneumonia --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import DataConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("breast", scale)
    config = dataclasses.replace(
        first.config,
        data=DataConfig("pneumoniamnist"),
        epochs=first.config.epochs // 4,
        batch_size=128,
    )
    return dataclasses.replace(
        first,
        title="Medical images: chest X-rays",
        config=config,
        seeds=5,
        caption=first.caption.replace(
            "BreastMNIST, its 702 images for training and test in five folds, twice",
            "PneumoniaMNIST, tested on its own 624 images, which are of other patients",
        ),
    )
