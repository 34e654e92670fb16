"""Adam in spectral coordinates against Adam, at equal steps and in equal time.

python -m experiments.tables coordinates --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Adam in spectral coordinates",
        claim="Is a step of a wide MLP cheaper in coordinates, and Adam no worse?",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (2048, 2048)}),
            probe=ProbeConfig(0),
            epochs=2 if scale == "cpu" else 30,
            batch_size=512,
        ),
        contenders=(
            "adam",
            "adam+coordinates:rank=128,refresh_every=50",
            "adam+coordinates:rank=128,tracking=0,refresh_every=50",
            "adam+coordinates:rank=128,refresh_every=1000000",
        ),
        views=("evaluations", "time"),
        caption=(
            "Fashion-MNIST, an MLP 2048×2, 512 images a step. Of 128 columns half "
            "follow the gradient, or none (`tracking=0`), or all stay what they are at "
            "the first step."
        ),
    )
