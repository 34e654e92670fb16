"""All kinds of optimizers on one task: accuracy, and the minima that they end in.

python -m experiments.tables fashion --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("projection", scale)
    return dataclasses.replace(
        first,
        title="Optimizers and their minima",
        claim="Which optimizer is most accurate, and does it end in a flatter minimum?",
        config=dataclasses.replace(
            first.config, probe=ProbeConfig(256), eval_every=100, sharpness=True
        ),
        contenders=(
            "adamw",
            "momentum",
            *(f"sam:rho={rho}" for rho in (0.01, 0.02, 0.05, 0.1, 0.2)),
            "msam",
            "muon:momentum=0.95",
            "galore",
            "spectral_muon",
            "adamw+coordinates:rank=64",
            "dsbp",
            "dsbp_paper",
            "dsbp_sam",
            "spectral_sam",
            "dsbp_lie",
        ),
        metrics=("accuracy", "loss", "hessian", "trace"),
        caption=(
            "Fashion-MNIST, an MLP 256×2, four passes, as many gradient evaluations "
            "for all, without weight decay; rates are searched for each radius of SAM, "
            "other kinds of SAM have a radius of 0.05. hessian is the top eigenvalue, "
            "trace the trace (estimated) for the training loss at the end, at the "
            "rates that are best for accuracy."
        ),
    )
