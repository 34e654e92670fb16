"""Tuning for another kind of images by 50 labels: what is learned, what is kept.

python -m experiments.tables transfer_pneumonia --data-dir DIR
"""

from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table
from experiments.transfer_config import FRONT, TransferConfig


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Spectral transfer: other images",
        claim="What is kept of the source depends on where tuning may move.",
        config=TransferConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            epochs=3 if scale == "cpu" else 20,
            labels=50,
            target="pneumoniamnist",
        ),
        contenders=FRONT,
        metrics=("accuracy", "kept"),
        caption=(
            "Fashion-MNIST, an MLP 512×2 trained for 3 epochs of Adam, tuned "
            "on 50 chest X-rays of PneumoniaMNIST; `kept` is the accuracy on "
            "the source's test images under its own, frozen head. Rates are chosen by "
            "the target's validation images; strengths are contenders of their own, "
            "for they are a choice between the two columns."
        ),
    )
