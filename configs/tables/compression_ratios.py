"""Smaller models over shares of FLOPs, before and after they are tuned again.

python -m experiments.tables compression_ratios --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table

SHARES = (0.75, 0.25, 0.1, 0.05)


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("compression", scale)
    return dataclasses.replace(
        first,
        title="Smaller models, by the share that is kept",
        claim="How small can a model become, and where do ways to cut part?",
        contenders=(
            "whole",
            *(
                f"{method}:flops={share}"
                for share in SHARES
                for method in ("spectral", "factors", "l1", "magnitude")
            ),
        ),
        seeds=3,
        caption=(
            "Fashion-MNIST, an MLP 512×2 of 5 epochs of Adam, cut and tuned for one "
            "more; `before` is the accuracy before that, latency that of a pass of 256 "
            "images. Half of the FLOPs stands in the table of smaller models."
        ),
    )
