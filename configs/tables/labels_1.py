"""Optimizers where one in a hundred of the training images has a label.

python -m experiments.tables labels_1 --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Few labels: one in a hundred",
        claim="What is faster with many labels: does it also generalise from few?",
        config=ImageConfig(
            data=DataConfig("fashion_mnist", labels=540),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            probe=ProbeConfig(0),
            steps=800 if scale == "cpu" else 4000,
            batch_size=128,
        ),
        contenders=("adamw", "momentum", "sam", "spectral_muon", "dsbp", "dsbp_paper"),
        tune=("rate", "decay"),
        caption=(
            "Fashion-MNIST, an MLP 512×2, as many gradient evaluations for all. The "
            "labelled images are one draw for all seeds: intervals do not have what "
            "another draw would change. Rates are chosen on 6,000 labelled images."
        ),
    )
