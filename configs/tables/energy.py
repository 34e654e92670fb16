"""The projection by shares of energy: columns that follow the spectrum.

python -m experiments.tables energy --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("projection", scale)
    return dataclasses.replace(
        first,
        title="Projection, by shares of energy",
        claim="Are columns worth more where their number follows the spectrum?",
        contenders=(
            "momentum",
            "dsbp:rank=64",
            *(f"dsbp:rank=64,energy={share}" for share in SHARES),
        ),
        caption=(
            "Fashion-MNIST, an MLP 256×2. Of 64 columns each layer uses the leading "
            "ones that hold the share of the trace that `energy` names; of the rest of "
            "the gradient a tenth is kept."
        ),
    )
