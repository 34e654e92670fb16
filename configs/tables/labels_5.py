"""Optimizers where one in twenty of the training images has a label.

python -m experiments.tables labels_5 --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("labels_1", scale)
    data = dataclasses.replace(first.config.data, labels=2700)
    return dataclasses.replace(
        first,
        title="Few labels: one in twenty",
        config=dataclasses.replace(first.config, data=data),
    )
