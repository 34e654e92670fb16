"""Perturbations where two fifths of the training labels are wrong.

python -m experiments.tables label_noise_40 --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("label_noise", scale)
    data = dataclasses.replace(first.config.data, label_noise=0.4)
    return dataclasses.replace(
        first,
        title="Perturbations where 40 % of the labels are wrong",
        config=dataclasses.replace(first.config, data=data),
        caption=first.caption.replace("20 %", "40 %"),
    )
