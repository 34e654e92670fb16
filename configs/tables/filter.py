"""Which way round, and does the spectrum matter: powers of it, and the share kept.

python -m experiments.tables filter --data-dir DIR
"""

from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.study.tables import Table

POWERS = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.0, 0.1, 1.0)


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="The filter: powers of the spectrum, and what is kept outside of it",
        claim=(
            "With all of the complement loss falls the more of the spectrum is divided "
            "by, up to its root, and a basis must follow; disorder does as well."
        ),
        config=ImageConfig(
            data=DataConfig("fashion_mnist"),
            model=ModelConfig("mlp", {"hidden": (512, 512)}),
            probe=ProbeConfig(0),
            epochs=2 if scale == "cpu" else 10,
            batch_size=256,
        ),
        contenders=(
            "spectral_muon",
            *(
                f"spectral_muon:power={power},residual={share}"
                for power in POWERS
                for share in SHARES
                if (power, share) != (0.5, 1.0)
            ),
            "frozen_muon",
            "kaon",
        ),
        metrics=("loss",),
        caption=(
            "Fashion-MNIST, an MLP 512×2. Of momentum's singular values σ the leading "
            "64 become σ^(1 − 2·power), all else κ = `residual` times the size that "
            "this gives the tail: at power 0 κ = 0 is the projection and κ = 1 "
            "momentum as it is; at ½ with all columns it is Muon's step. Controls: a "
            "basis that stays as it was first (`frozen_muon`), and singular values in "
            "disorder (`kaon`)."
        ),
    )
