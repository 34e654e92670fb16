"""Digits of scikit-learn, 8 × 8 pixels, with an MLP: needs no file and no network.

python -m experiments.train
"""

from experiments.config import Config


def config() -> Config:
    """The experiment."""
    return Config()
