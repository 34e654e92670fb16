"""Momentum divided by its spectrum, against AdamW and Muon, on bytes.

python -m experiments.tables text
"""

from experiments.config import TextConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Dividing by the spectrum, on text",
        claim="Whitening with few columns is between AdamW and Muon on text, too.",
        config=TextConfig(steps=667 if scale == "cpu" else 10_000),
        contenders=(
            "adamw:b2=0.95",
            "muon:momentum=0.95,b2=0.95,decays_all=True",
            "spectral_muon",
            "spectral_muon:damping=0.01",
            "spectral_muon:refresh_every=4",
            "spectral_muon:rank=16",
            "exact_muon",
            "scaled_muon",
            "frozen_muon",
            "low_rank_muon",
        ),
        tune=("rate", "decay"),
        caption=(
            "A byte-level Transformer, width 128, 3 blocks, on the source of Python's "
            "standard library, 16 windows of 128 bytes a step."
        ),
    )
