"""A corrupted part of CIFAR-10, a stream of it, before a small ResNet-18.

    python -m experiments.inference shifted_batch_norm --data-dir DIR

`--data.name cifar10` takes the whole set.
"""

from experiments.config import DataConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender
from experiments.shifted_config import ShiftedConfig


def config() -> ShiftedConfig:
    """The experiment."""
    return ShiftedConfig(
        data=DataConfig("cifar10_balanced", augment=True),
        model=ModelConfig("resnet18", {"width": 8}),
        optimizer=Contender.parse("adam:learning_rate=3e-3"),
        probe=ProbeConfig(0),
        epochs=7,
        batch_size=128,
    )
