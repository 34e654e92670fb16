"""Optimizers on scikit-learn's digits, the smallest images there are.

python -m experiments.tables digits
"""

from experiments.config import ImageConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    del scale
    return Table(
        title="Digits",
        claim="Does anything beat momentum on 1,257 images of 8 × 8 pixels?",
        config=ImageConfig(probe=ProbeConfig(0), eval_every=20),
        contenders=(
            "momentum",
            "sam",
            "msam",
            "dsbp",
            "dsbp_paper",
            "dsbp_sam",
            "adam",
            "muon",
            "galore",
        ),
        caption="An MLP 256×2, 380 steps of 64 images for one gradient a step.",
        minutes=20,
    )
