"""Momentum divided by its spectrum, against AdamW and Muon, on more bytes.

Three seeds: a run takes more than two minutes.

python -m experiments.tables text_long
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    short = cli.load_table("text", scale)
    return dataclasses.replace(
        short,
        title="Dividing by the spectrum, on more text",
        claim="Is whitening still ahead with four times as many steps?",
        config=dataclasses.replace(short.config, steps=4 * short.config.steps),
        contenders=(
            "adamw:b2=0.95",
            "muon:momentum=0.95,b2=0.95,decays_all=True",
            "spectral_muon:power=0.75",
            "spectral_muon:rank=16,power=0.75",
        ),
        views=("evaluations", "loss"),
        seeds=3,
    )
