"""Optimizers in as much time as AdamW takes for one pass.

python -m experiments.tables fixed_time --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("whitening", scale)
    return dataclasses.replace(
        first,
        title="In equal time",
        claim="Which optimizer makes the most of a fixed time?",
        config=dataclasses.replace(first.config, epochs=1 if scale == "cpu" else 5),
        contenders=(
            "adamw",
            "sam",
            "muon:momentum=0.95",
            "spectral_muon",
            "spectral_muon:rank=16",
            "adamw+coordinates:rank=128",
            "dsbp_paper",
        ),
        metrics=("accuracy", "loss"),
        views=("time",),
        tune=("rate",),
        caption=(
            "Fashion-MNIST, an MLP 512×2; all have the time in which AdamW makes one "
            "pass, and schedules of the length that fits into it."
        ),
    )
