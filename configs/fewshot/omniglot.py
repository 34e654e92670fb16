"""Omniglot characters, five ways and one shot, with a four-block network.

    python -m experiments.fewshot omniglot --data-dir DIR

FIGURE
"""

from experiments.config import ModelConfig
from experiments.fewshot.config import (
    FewshotConfig,
    FewshotDataConfig,
    InnerConfig,
    OuterConfig,
)


def config() -> FewshotConfig:
    """The experiment."""
    return FewshotConfig(
        data=FewshotDataConfig("omniglot"),
        model=ModelConfig("conv4", {"channels": 32}),
        inner=InnerConfig(learning_rate=0.4, test_steps=3),
        outer=OuterConfig(tasks=16, steps=20_000),
        eval_every=1000,
    )
