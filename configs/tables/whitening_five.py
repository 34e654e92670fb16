"""Momentum divided by its spectrum, over half as many passes as `whitening_long`.

python -m experiments.tables whitening_five --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    long = cli.load_table("whitening_long", scale)
    return dataclasses.replace(
        long,
        title="Dividing by the spectrum, half as many passes",
        claim="Is AdamW better with half of the many passes?",
        config=dataclasses.replace(long.config, epochs=long.config.epochs // 2),
        metrics=("loss",),
    )
