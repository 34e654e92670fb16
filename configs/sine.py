"""Regression of sine waves from ten points, five steps, with learned inner rates.

    python -m experiments.train sine

Squared error 0.056 ± 0.007 after five steps on 600 test tasks (95 % confidence), in 33
seconds on one CPU core, everything included.
"""

from experiments.config import ModelConfig
from experiments.fewshot_config import FewshotConfig, InnerConfig, OuterConfig


def config() -> FewshotConfig:
    """The experiment."""
    return FewshotConfig(
        model=ModelConfig("mlp", {"hidden": (40, 40)}),
        inner=InnerConfig(learning_rate=0.003, steps=5, learned_rates=True),
        outer=OuterConfig(learning_rate=3e-3, tasks=25),
        shots=10,
        eval_every=1000,
    )
