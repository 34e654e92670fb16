"""Momentum divided by its spectrum, against AdamW and Muon, in a Vision Transformer.

python -m experiments.tables whitening_vit --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Dividing by the spectrum, in a Vision Transformer",
        claim="Heads and perceptrons of images: is whitening ahead here too?",
        config=ImageConfig(
            data=DataConfig("cifar10_balanced"),
            model=ModelConfig("vit", {"patch": 4, "dim": 64, "depth": 3, "heads": 4}),
            probe=ProbeConfig(0),
            epochs=2 if scale == "cpu" else 20,
            eval_every=10_000,
            batch_size=128,
        ),
        contenders=("adamw", "muon:momentum=0.95", "spectral_muon"),
        metrics=("loss", "accuracy"),
        caption="2,000 images a class of CIFAR-10, a ViT of three blocks, 64 wide.",
    )
