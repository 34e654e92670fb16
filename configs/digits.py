"""Digits of scikit-learn, 8 × 8 pixels, with an MLP: needs no file and no network.

    python -m experiments.train

Test accuracy 96.7 % (360 images) in 15 seconds on two CPU cores, imports,
compilation, probes and report included.
"""

from experiments.config import Config


def config() -> Config:
    """The experiment."""
    return Config()
