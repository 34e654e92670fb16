"""A 2-D set of MedMNIST, BreastMNIST unless `--data.name` says otherwise, with a CNN.

    python -m experiments.train medmnist --data-dir DIR
    python -m experiments.train medmnist --data-dir DIR --data.name pneumoniamnist

BreastMNIST: test accuracy 81.4 % (156 images) in 93 seconds on two CPU cores that
other programs shared.
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig
from experiments.optimizers import Contender


def config() -> ImageConfig:
    """The experiment."""
    return ImageConfig(
        data=DataConfig("breastmnist"),
        model=ModelConfig("cnn"),
        optimizer=Contender.parse("dsbp:weight_decay=5e-4"),
        epochs=20,
        batch_size=64,
    )
