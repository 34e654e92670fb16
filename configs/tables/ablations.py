"""The projection's options, one at a time: columns, share of energy, side, refreshes.

python -m experiments.tables ablations --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("projection", scale)
    return dataclasses.replace(
        first,
        title="Projection, one option at a time",
        claim="Which options of the projection matter?",
        contenders=(
            "dsbp",
            "momentum",
            *(f"dsbp:rank={rank}" for rank in (4, 16, 128)),
            *(f"dsbp:energy={share}" for share in (0.5, 0.8, 0.95, 0.99)),
            *(f"dsbp:side={side}" for side in ("input", "both")),
            *(f"dsbp:refresh_every={period}" for period in (1, 100, None)),
            "dsbp:num_blocks=3",
            "dsbp:residual=0,refresh_every=1",
            "dsbp_paper",
            "dsbp_paper:refresh_every=1",
        ),
        caption=(
            "Fashion-MNIST, an MLP 256×2. The first row has 64 columns on the side of "
            "the outputs, refreshed every 10 steps with two Krylov blocks; of the "
            "gradient outside of them a tenth is kept. `energy` uses of these 64 the "
            "leading ones that hold this share of the trace; `refresh_every=None` "
            "keeps the first basis. `dsbp_paper` follows activations, keeps nothing "
            "outside and has no momentum. Other sources and the share that is kept "
            "are in the table of the projection, powers of the spectrum in that of "
            "the filter."
        ),
    )
