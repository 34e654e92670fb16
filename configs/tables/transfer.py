"""Tuning for another task: what is learned of it, and what is kept of the first.

python -m experiments.tables transfer --data-dir DIR
"""

from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table
from experiments.transfer_config import TransferConfig


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Spectral transfer",
        claim="As good on the target, and nothing of the source is lost.",
        config=TransferConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            epochs=3 if scale == "cpu" else 20,
            labels=500,
        ),
        contenders=(
            "full",
            "probe",
            "replay",
            "l2sp:strength=0.01",
            "l2sp:strength=0.1",
            "ewc:strength=100",
            "ewc:strength=10000",
            "lora:rank=8",
            "spectral_lora:start=explained",
            "spectral_lora:start=null",
            "spectral_lora:start=explained,train=output",
            "spectral_lora:start=null,train=output",
            "spectral_transfer:strength=0.01",
            "spectral_transfer:strength=1",
            "project_away:energy=0.95",
            "project_away:energy=0.99",
        ),
        metrics=("accuracy", "kept"),
        margin=0.5,
        caption=(
            "Fashion-MNIST, an MLP 512×2 trained on classes 0 to 4 for 3 epochs of "
            "Adam, tuned on 500 labels of classes 5 to 9; `kept` is the accuracy on "
            "the source's test images under its own, frozen head. Rates are chosen by "
            "the target's validation images; strengths are contenders of their own, "
            "for they are a choice between the two columns."
        ),
    )
