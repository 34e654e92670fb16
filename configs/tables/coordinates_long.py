"""Kernels trained in few coordinates, over many passes.

python -m experiments.tables coordinates_long --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    short = cli.load_table("coordinates_whitened", scale)
    return dataclasses.replace(
        short,
        title="Coordinates, many passes",
        claim="Over ten passes, with decay tuned, what do few columns cost?",
        config=dataclasses.replace(short.config, epochs=10 if scale == "cpu" else 30),
        contenders=(
            "adamw",
            "adamw+coordinates:rank=128",
            "spectral_muon+coordinates:rank=128",
        ),
        metrics=("accuracy", "loss"),
        caption=(
            "Fashion-MNIST, an MLP 1024×2, 512 images a step; columns are renewed "
            "every 10 steps."
        ),
    )
