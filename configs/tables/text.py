"""Momentum divided by its spectrum, against AdamW and Muon, on bytes.

python -m experiments.tables text
"""

from experiments.config import TextConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Dividing by the spectrum, on text",
        claim="With few columns and more power whitening is ahead of Muon.",
        config=TextConfig(
            steps=500 if scale == "cpu" else 10_000,
            depth=2 if scale == "cpu" else 3,
            context=64 if scale == "cpu" else 128,
            eval_every=10_000,
        ),
        contenders=(
            "adamw:b2=0.95",
            "muon:momentum=0.95,b2=0.95,decays_all=True",
            "spectral_muon:power=0.75",
            "spectral_muon",
        ),
        tune=("rate",) if scale == "cpu" else ("rate", "decay"),
        caption=(
            "A byte-level Transformer, width 128, on the source of Python's standard "
            "library, 16 windows a step."
        ),
    )
