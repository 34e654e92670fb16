"""How many columns, and how fresh: what whitening needs of its basis.

python -m experiments.tables columns --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table

RANKS = (8, 16, 32, 128, 256)
PERIODS = (2, 4, 10)


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("filter", scale)
    return dataclasses.replace(
        first,
        title="Columns and their age",
        claim="Does loss fall with more columns, and how soon is a basis stale?",
        contenders=(
            "spectral_muon",
            "scaled_muon",
            *(f"spectral_muon:rank={rank}" for rank in RANKS),
            "exact_muon",
            *(f"spectral_muon:refresh_every={period}" for period in PERIODS),
        ),
        caption=(
            "Fashion-MNIST, an MLP 512×2. 64 columns refreshed at every step, beside "
            "none (`scaled_muon`), others, all (`exact_muon`), and older ones."
        ),
    )
