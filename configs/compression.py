"""Fashion-MNIST: an MLP, trained, cut to half of its FLOPs, and tuned again.

python -m experiments.compare compression --data-dir DIR --contenders whole spectral l1
"""

from experiments.compression_config import CompressionConfig
from experiments.config import DataConfig, ModelConfig


def config() -> CompressionConfig:
    """The experiment."""
    return CompressionConfig(
        data=DataConfig("fashion_mnist"),
        model=ModelConfig("mlp", {"hidden": (512, 512)}),
    )
