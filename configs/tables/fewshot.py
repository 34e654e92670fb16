"""Methods of few-shot learning on Omniglot, in equal training time.

python -m experiments.tables fewshot --data-dir DIR
"""

from experiments.config import ModelConfig
from experiments.fewshot_config import (
    FewshotConfig,
    FewshotDataConfig,
    InnerConfig,
    OuterConfig,
)
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    return Table(
        title="Few-shot learning",
        claim="Are projected inner gradients better than whole ones?",
        config=FewshotConfig(
            data=FewshotDataConfig("omniglot"),
            model=ModelConfig("conv4", {"channels": 32}),
            inner=InnerConfig(learning_rate=0.4, test_steps=3),
            outer=OuterConfig(learning_rate=2e-3, tasks=16),
            steps=1_000_000,
            minutes=0.75 if scale == "cpu" else 10.0,
            eval_every=1_000_000,
            eval_episodes=600,
        ),
        contenders=(
            "maml",
            "fomaml",
            "anil",
            "spectral_maml",
            "spectral_fomaml",
            "spectral_maml:spectral.residual=0.5",
        ),
        seeds=3,
        tune=("inner", "outer"),
        caption=(
            "Omniglot, five ways and one shot, a four-block network of 32 channels, so "
            "much training time for each; test tasks go with the seed."
        ),
    )
