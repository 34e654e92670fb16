"""A byte-level Transformer on the source of Python's standard library.

    python -m experiments.train text

No loss has been measured at this length yet.
"""

from experiments.config import TextConfig
from experiments.optimizers import Contender


def config() -> TextConfig:
    """The experiment."""
    return TextConfig(optimizer=Contender.parse("adamw:b2=0.95,weight_decay=0.1"))
