"""Corrupted Fashion-MNIST, a stream of it, before an MLP.

python -m experiments.inference shifted --data-dir DIR
"""

from experiments.config import DataConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender
from experiments.shifted_config import ShiftedConfig


def config() -> ShiftedConfig:
    """The experiment."""
    return ShiftedConfig(
        data=DataConfig("fashion_mnist"),
        model=ModelConfig("mlp", {"hidden": (256, 256)}),
        optimizer=Contender.parse("adam:learning_rate=1e-3"),
        probe=ProbeConfig(0),
        epochs=6,
        batch_size=128,
    )
