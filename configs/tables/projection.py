"""What a projection on the eigenspace costs, by the share κ of the rest that is kept.

python -m experiments.tables projection --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ProbeConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Projection: what the complement is worth",
        claim="At equal steps a projection costs accuracy, the more the smaller κ.",
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            probe=ProbeConfig(0),
            epochs=4 if scale == "cpu" else 30,
            batch_size=128,
        ),
        contenders=(
            "momentum",
            "dsbp:residual=0.5",
            "dsbp:residual=0.3",
            "dsbp",
            "dsbp:source=activation",
            "dsbp_paper",
            "sam",
            "msam",
            "adam",
        ),
        caption="Fashion-MNIST, an MLP 256×2; κ is `residual`, 0.1 by default.",
    )
