"""Few-shot learning with whitened inner and outer steps, in equal training time.

python -m experiments.tables fewshot_whitened --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("fewshot", scale)
    return dataclasses.replace(
        first,
        title="Few-shot learning, whitened",
        claim="Does it help to divide meta-gradients, or inner ones, by their spectra?",
        contenders=(
            "maml",
            "maml:outer.optimizer=spectral_muon",
            "fomaml:outer.optimizer=spectral_muon",
            "whitened_maml:spectral.rank=32",
        ),
        caption=(
            "Omniglot, five ways and one shot, a four-block network of 32 channels, so "
            "much training time for each; test tasks go with the seed. `outer.optimizer"
            "=spectral_muon` whitens meta-gradients of hidden layers, `whitened_maml` "
            "the gradients of their inner steps, "
            "exactly: with as many columns as there are."
        ),
    )
