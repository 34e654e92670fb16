"""Whitening in spectral coordinates of wide layers, against AdamW: steps and time.

python -m experiments.tables coordinates_wide --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    adam = cli.load_table("coordinates", scale)
    return dataclasses.replace(
        adam,
        title="Coordinates of wide layers, with whitening",
        claim="Where steps in coordinates are cheaper: how soon is AdamW's loss there?",
        contenders=(
            "adamw",
            "spectral_muon:rank=16",
            "adamw+coordinates:rank=128,refresh_every=50",
            "spectral_muon+coordinates:rank=128,refresh_every=50",
            "spectral_muon+coordinates:rank=128,refresh_every=1000000",
            "adamw+lora:rank=128",
        ),
        metrics=("loss",),
        views=("evaluations", "loss"),
        tune=("rate", "decay"),
        caption=(
            "Fashion-MNIST, an MLP 2048×2, 512 images a step. Of 128 columns half "
            "follow the gradient; with `refresh_every=1000000` all stay what they are "
            "at the first step. `lora` trains both factors of 128 columns, and its "
            "hidden kernels stay as they began."
        ),
    )
