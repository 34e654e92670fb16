"""Tuning for another task by 50 labels: what is learned, and what is kept.

python -m experiments.tables transfer_few --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("transfer", scale)
    return dataclasses.replace(
        first,
        title="Spectral transfer: few labels",
        claim="What is kept of the source depends on where tuning may move.",
        config=dataclasses.replace(first.config, labels=50),
        caption=(
            "Fashion-MNIST, an MLP 512×2 trained on classes 0 to 4 for 3 epochs of "
            "Adam, tuned on 50 labels of classes 5 to 9; `kept` is the accuracy on "
            "the source's test images under its own, frozen head. Rates are chosen by "
            "the target's validation images; strengths are contenders of their own, "
            "for they are a choice between the two columns."
        ),
    )
