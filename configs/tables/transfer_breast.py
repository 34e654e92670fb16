"""Tuning for another kind of images by 50 labels: what is learned, what is kept.

python -m experiments.tables transfer_breast --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("transfer_pneumonia", scale)
    return dataclasses.replace(
        first,
        title="Spectral transfer: ultrasound images",
        config=dataclasses.replace(first.config, target="breastmnist"),
        caption=first.caption.replace(
            "chest X-rays of PneumoniaMNIST", "ultrasound images of BreastMNIST"
        ),
    )
