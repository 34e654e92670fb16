"""Optimizers on small colour images, with a convolutional network.

python -m experiments.tables cifar10 --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Colour images",
        claim="Does a spectral method train a better convolutional network?",
        config=ImageConfig(
            data=DataConfig("cifar10_balanced"),
            model=ModelConfig("cnn", {"channels": (16, 32), "hidden": 128}),
            probe=ProbeConfig(256),
            epochs=2 if scale == "cpu" else 20,
            eval_every=10_000,
            batch_size=128,
            sharpness=True,
        ),
        contenders=(
            "adamw",
            "sam",
            "muon:momentum=0.95",
            "spectral_muon",
            "adamw+coordinates:rank=32",
            "dsbp_paper",
        ),
        metrics=("accuracy", "loss", "hessian", "trace"),
        caption=(
            "2,000 images a class of CIFAR-10, two blocks of convolution and two dense "
            "layers, as many gradient evaluations for all. hessian is the top "
            "eigenvalue, trace the trace (estimated) for the training loss at the end, "
            "at the rates that are best for accuracy."
        ),
    )
