"""Momentum divided by its spectrum, over five passes.

python -m experiments.tables whitening_five --data-dir DIR
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
        title="Dividing by the spectrum, five passes",
        claim="Between two passes and ten, is AdamW at its best?",
        config=dataclasses.replace(long.config, epochs=long.config.epochs // 2),
        metrics=("loss",),
    )
