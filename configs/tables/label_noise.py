"""Perturbations where a fifth of the training labels is wrong.

python -m experiments.tables label_noise --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Perturbations under label noise",
        claim="At equal gradient evaluations momentum is a hard rival of any SAM.",
        config=ImageConfig(
            data=DataConfig("fashion_mnist", label_noise=0.2),
            probe=ProbeConfig(256),
            epochs=6 if scale == "cpu" else 16,
            batch_size=128,
            sharpness=True,
        ),
        contenders=(
            "momentum",
            "sam",
            "msam",
            "spectral_sam",
            "eigen_sam",
            "dsbp_sam",
        ),
        metrics=("accuracy", "hessian", "trace"),
        caption=(
            "Fashion-MNIST with 20 % of the training labels wrong, an MLP 256×2; "
            "hessian is the top eigenvalue, trace the trace (estimated) for the "
            "training loss at the end, at the rates that are best for accuracy."
        ),
    )
