"""Five alphabets of Omniglot in turn: what is left of each when the last is learned.

python -m experiments.compare sequence --data-dir DIR --contenders full ewc project_away
"""

from experiments.config import DataConfig, ModelConfig
from experiments.sequence_config import SequenceConfig


def config() -> SequenceConfig:
    """The experiment."""
    return SequenceConfig(
        data=DataConfig("omniglot"),
        model=ModelConfig("mlp", {"hidden": (512, 512)}),
    )
