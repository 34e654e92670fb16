"""Momentum divided by its spectrum, wide layers, at AdamW's best length.

Its losses after three and ten passes are in `whitening_wide` and `coordinates_long`.

python -m experiments.tables whitening_wide_five --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    short = cli.load_table("whitening_wide", scale)
    return dataclasses.replace(
        short,
        title="Dividing by the spectrum, wide layers, five passes",
        claim="At AdamW's best of three, five and ten, are fewer steps less time?",
        config=dataclasses.replace(short.config, epochs=5 if scale == "cpu" else 20),
        contenders=(
            "adamw",
            "spectral_muon",
            "spectral_muon:rank=16",
            "spectral_muon+coordinates:rank=128",
        ),
        caption="Fashion-MNIST, an MLP 1024×2, 512 images a step.",
    )
