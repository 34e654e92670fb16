"""Adam in tracked eigenspaces against GaLore.

python -m experiments.tables subspace --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Adam in an eigenspace",
        claim="Moments that follow their basis are worth more than an exact basis.",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            probe=ProbeConfig(0),
            epochs=2 if scale == "cpu" else 20,
            batch_size=108,
        ),
        contenders=(
            "adam",
            "galore",
            "galore:refresh_every=200",
            "subspace_adam:residual=0",
            "subspace_adam",
        ),
        metrics=("accuracy", "loss"),
        caption=(
            "Fashion-MNIST, an MLP 512×2, 1,000 steps of 108 images; `optax.contrib."
            "galore` with our gap of 10 steps, and with its own of 200."
        ),
    )
