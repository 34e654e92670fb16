"""Adam in tracked eigenspaces against GaLore.

python -m experiments.tables subspace --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Adam in an eigenspace",
        claim="What matters is the side of the basis, and that it stays for a while.",
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
            "subspace_adam:refresh_every=10",
            "subspace_adam:residual=0,side=smaller",
            "subspace_adam:side=smaller,refresh_every=10",
        ),
        metrics=("accuracy", "loss"),
        caption=(
            "Fashion-MNIST, an MLP 512×2, 1,000 steps of 108 images; `optax.contrib."
            "galore` with a gap of 10 steps, and with its own of 200; `subspace_adam` "
            "on the input side (`smaller`: of the smaller dimension) every 200 steps, "
            "`residual` times the complement kept (0.1)."
        ),
    )
