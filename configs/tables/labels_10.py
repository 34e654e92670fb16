"""Optimizers where one in ten of the training images has a label.

python -m experiments.tables labels_10 --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("labels_1", scale)
    data = dataclasses.replace(first.config.data, labels=5400)
    return dataclasses.replace(
        first,
        title="Few labels: one in ten",
        config=dataclasses.replace(first.config, data=data),
    )
