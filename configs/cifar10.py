"""CIFAR-10 with a ResNet-18, random shifts and flips.

    python -m experiments.train cifar10 --data-dir DIR

A ResNet-18 wants an accelerator; `--model.name cnn` trains on a CPU. No accuracy has
been measured here yet.
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig
from experiments.optimizers import Contender


def config() -> ImageConfig:
    """The experiment."""
    return ImageConfig(
        data=DataConfig("cifar10", augment=True),
        model=ModelConfig("resnet18"),
        optimizer=Contender.parse("dsbp:weight_decay=5e-4"),
        epochs=30,
        batch_size=128,
    )
