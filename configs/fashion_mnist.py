"""Fashion-MNIST with an MLP, or a CNN.

python -m experiments.train fashion_mnist --data-dir DIR
python -m experiments.train fashion_mnist --data-dir DIR --model.name cnn
"""

from experiments.config import Config, DataConfig


def config() -> Config:
    """The experiment."""
    return Config(
        data=DataConfig("fashion_mnist"),
        epochs=10,
        batch_size=128,
    )
