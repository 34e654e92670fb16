"""Corrupted Fashion-MNIST, a stream of it, before a Vision Transformer.

python -m experiments.inference shifted_layer_norm --data-dir DIR
"""

from experiments.config import DataConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender
from experiments.shifted_config import ShiftedConfig


def config() -> ShiftedConfig:
    """The experiment."""
    return ShiftedConfig(
        data=DataConfig("fashion_mnist"),
        model=ModelConfig("vit", {"patch": 7, "dim": 64, "depth": 3, "heads": 4}),
        optimizer=Contender.parse("adam:learning_rate=1e-3"),
        probe=ProbeConfig(0),
        epochs=4,
        batch_size=128,
    )
