"""Fashion-MNIST: an MLP of five classes, tuned for the other five by 50 labels.

python -m experiments.compare transfer --data-dir DIR --contenders full lora l2sp
"""

from experiments.config import DataConfig, ModelConfig
from experiments.transfer_config import TransferConfig


def config() -> TransferConfig:
    """The experiment."""
    return TransferConfig(
        data=DataConfig("fashion_mnist"),
        model=ModelConfig("mlp", {"hidden": (512, 512)}),
    )
