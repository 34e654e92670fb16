"""Muon over many passes, against what divides by few columns.

Three seeds: a run of Muon takes minutes.

python -m experiments.tables muon_long --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    long = cli.load_preset(
        "whitening_long", cli.PRESETS / "tables", scale, function="table"
    )
    return dataclasses.replace(
        long,
        title="Dividing by the spectrum, many passes with Muon",
        claim="Over ten passes, with decay tuned, is whitening no worse than Muon?",
        contenders=("muon:momentum=0.95", "adamw", "spectral_muon"),
        metrics=("loss",),
        views=("evaluations",),
        seeds=3,
        caption="Fashion-MNIST, an MLP 512×2; rates and decays are each row's own.",
    )
