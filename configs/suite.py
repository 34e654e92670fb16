"""A problem of the suite: a run of seconds.

    python -m experiments.train suite --problem saddle --optimizer muon:momentum=0.95

All problems, and several optimizers: python -m experiments.suite
"""

from experiments.optimizers import Contender
from experiments.suite_config import SuiteConfig


def config() -> SuiteConfig:
    """The experiment."""
    return SuiteConfig(optimizer=Contender.parse("adamw"))
