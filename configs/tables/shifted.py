"""Methods of test-time adaptation on a stream of corrupted images.

python -m experiments.tables shifted --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    config = cli.load_preset("shifted")
    return Table(
        title="Shifted images",
        claim="Moving layers' inputs back helps without a batch norm to adapt.",
        config=dataclasses.replace(config, images=2000 if scale == "cpu" else 10_000),
        contenders=("none", "spectral", "t3a", "linear_tca", "full_rank"),
        tune=(),
        caption=(
            "Fashion-MNIST under fifteen corruptions of severity 5, one after the "
            "other and untold, 200 images at a time; an MLP 256×2, trained on clean "
            "images. `full_rank` moves all layers up to 256 wide by the same kind of "
            "map, without alarm or guard; moving the pixels too, it loses to `none`."
        ),
    )
