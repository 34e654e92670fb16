"""Few images: optimizers and their minima on ultrasound images.

python -m experiments.tables breast --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Medical images: ultrasound",
        claim="Does a spectral method train a better model where images are few?",
        config=ImageConfig(
            data=DataConfig("breastmnist", folds=5),
            model=ModelConfig("mlp", {"hidden": (256, 256)}),
            probe=ProbeConfig(256),
            epochs=40 if scale == "cpu" else 100,
            eval_every=100,
            batch_size=64,
            sharpness=True,
        ),
        contenders=(
            "adamw",
            "momentum",
            "sam",
            "muon:momentum=0.95",
            "spectral_muon",
            "adamw+coordinates:rank=64",
            "dsbp",
            "dsbp_paper",
        ),
        metrics=("accuracy", "hessian", "trace"),
        seeds=10,
        caption=(
            "BreastMNIST, its 702 images for training and test in five folds, twice, "
            "an MLP 256×2, as many gradient evaluations for all. hessian is the top "
            "eigenvalue, trace the trace (estimated) for the training loss at the end, "
            "at the rates that are best for accuracy."
        ),
    )
