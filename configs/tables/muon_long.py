"""Muon over many passes, against what divides by few columns.

python -m experiments.tables muon_long --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    long = cli.load_table("whitening_long", scale)
    model = ModelConfig("mlp", {"hidden": (256, 256)})
    return dataclasses.replace(
        long,
        title="Dividing by the spectrum, many passes with Muon",
        claim="Over many passes, with decay tuned, is whitening no worse than Muon?",
        config=dataclasses.replace(long.config, model=model),
        contenders=("muon:momentum=0.95", "adamw", "spectral_muon"),
        metrics=("loss",),
        views=("evaluations",),
        caption=(
            "Fashion-MNIST, an MLP 256×2: with layers twice as wide ten passes of Muon "
            "would take an hour. Rates and decays are each row's own."
        ),
    )
