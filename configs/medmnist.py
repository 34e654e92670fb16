"""A 2-D set of MedMNIST, BreastMNIST unless `--data.name` says otherwise, with a CNN.

    python -m experiments.train medmnist --data-dir DIR
    python -m experiments.train medmnist --data-dir DIR --data.name pneumoniamnist

BreastMNIST: test accuracy 81.4 % (156 images) in 93 seconds on two CPU cores that
other programs shared.
"""

from experiments.config import Config, DataConfig, ModelConfig
from experiments.optimizers import OptimizerConfig


def config() -> Config:
    """The experiment."""
    return Config(
        data=DataConfig("breastmnist"),
        model=ModelConfig("cnn"),
        optimizer=OptimizerConfig("dsbp", weight_decay=5e-4),
        epochs=20,
        batch_size=64,
    )
