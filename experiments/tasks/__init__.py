"""What is trained: one module a task, on the engine of `experiments.study`.

`images` classifies images, `text` predicts bytes, `fewshot` learns to learn; the first
two share `optimized`, which is what any optimizer of `experiments.optimizers` needs.
`compression` tunes a trained model after it was cut, `transfer` one for another task;
`shifted` sees what one makes of shifted images; `suite` has small problems for any
optimizer. A config makes its task; `read` finds the config of a file.
"""

from collections.abc import Mapping
from typing import Any

from experiments import checks
from experiments.compression_config import CompressionConfig
from experiments.config import ImageConfig, TextConfig
from experiments.fewshot_config import FewshotConfig
from experiments.shifted_config import ShiftedConfig
from experiments.study.config import Config as Config, from_json
from experiments.study.task import Task as Task
from experiments.suite_config import SuiteConfig
from experiments.transfer_config import TransferConfig

CONFIGS = {
    kind.__name__: kind
    for kind in (
        *(ImageConfig, TextConfig, FewshotConfig),
        *(CompressionConfig, TransferConfig, ShiftedConfig, SuiteConfig),
    )
}


def read(values: Mapping[str, Any]) -> Config:
    """The inverse of `study.config.what`.

    Raises:
      ValueError: If the task or a field is unknown, or a value is not accepted.

    Example:
      >>> from experiments.study.config import what
      >>> read(what(TextConfig(seed=3))) == TextConfig(seed=3)
      True
    """
    values = dict(values)
    task = values.pop("task")
    checks.one_of("task", task, CONFIGS)
    return from_json(CONFIGS[task], values)
