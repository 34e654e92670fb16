"""CIFAR-FS, five ways and one shot, with a four-block network.

    python -m experiments.train cifar_fs --data-dir DIR

40.2 ± 0.8 % on 600 test tasks after 350 steps, two minutes on one CPU core
(--minutes 2), on a part of the set (100 images a class).
"""

from experiments.config import ModelConfig
from experiments.fewshot_config import (
    FewshotConfig,
    FewshotDataConfig,
    InnerConfig,
    OuterConfig,
)


def config() -> FewshotConfig:
    """The experiment."""
    return FewshotConfig(
        data=FewshotDataConfig("cifar_fs"),
        model=ModelConfig("conv4", {"channels": 32, "pool": True}),
        inner=InnerConfig(learning_rate=0.05, steps=3, test_steps=5),
        outer=OuterConfig(tasks=4),
        queries=15,
    )
