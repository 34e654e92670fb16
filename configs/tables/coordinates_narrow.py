"""AdamW on a net whose steps cost what those of `coordinates_wide` cost in coordinates.

python -m experiments.tables coordinates_narrow --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    wide = cli.load_table("coordinates_wide", scale)
    model = ModelConfig("mlp", {"hidden": (1744, 1744)})
    return dataclasses.replace(
        wide,
        title="A narrower net at the price of coordinates",
        claim="Is a narrower net as good as a wide one in few coordinates?",
        config=dataclasses.replace(wide.config, model=model),
        contenders=("adamw",),
        views=("evaluations",),
        caption=(
            "Fashion-MNIST, 512 images a step, an MLP 1744×2: steps of AdamW that take "
            "about as long as those in 128 coordinates of an MLP 2048×2, of which the "
            "times are in that table."
        ),
    )
