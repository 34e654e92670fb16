"""Five alphabets in turn: what is left of each when the last is learned.

python -m experiments.tables sequence --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    config = cli.load_preset("sequence")
    if scale != "cpu":
        config = dataclasses.replace(config, task_steps=1000)
    return Table(
        title="Five tasks in turn",
        claim="What is protected of each layer decides what is left of earlier tasks.",
        config=config,
        contenders=(
            "full",
            "l2sp:strength=0.01",
            "l2sp:strength=0.1",
            "ewc:strength=1000000",
            "ewc:strength=10000",
            "project_away:energy=0.95",
            "project_away:energy=0.95,source_rank=256",
            "spectral_transfer:strength=0.01",
            "spectral_transfer:strength=1",
        ),
        metrics=("accuracy", "first", "last"),
        caption=(
            "Five alphabets of Omniglot, 20 characters of each, 14 drawings of a "
            "character to learn from; an MLP 512×2, as many steps of Adam on each, a "
            "head for each. Accuracy is the mean over all five at the end, `first` and "
            "`last` that of the first and of the last one. `project_away` has the "
            "leading directions of all earlier tasks together, by a share of their "
            "energy and at most 64 of each task and layer, or 256 (gradient projection "
            "memory adds those of each task); `ewc` is the online form."
        ),
    )
