"""Optimizers on small photographs of 200 classes, with a convolutional network.

python -m experiments.tables tiny_imagenet --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    colour = cli.load_table("cifar10", scale)
    config = dataclasses.replace(
        colour.config,
        data=DataConfig("tiny_imagenet"),
        model=ModelConfig("conv4", {"channels": 48}),
        epochs=10 if scale == "cpu" else 50,
        sharpness=False,
    )
    return dataclasses.replace(
        colour,
        title="Photographs of 200 classes",
        config=config,
        metrics=("accuracy",),
        seeds=3,
        caption=(
            "50 images a class of Tiny ImageNet, ten passes, four blocks of "
            "convolution and batch normalisation, as many gradient evaluations for "
            "all. Rates are chosen on training images held out."
        ),
    )
