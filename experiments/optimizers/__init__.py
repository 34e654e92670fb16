"""What experiments compare: optimizers, their options, and where gradients come from.

`contenders` reads the text that names one, and builds it; `table` has all names.
`optimizer` is what all have in common, `published` and `spectral` are those of others
and ours, `imported` any function by its dotted name, and `gradients` what stands
between the loss and the optimizer. `msam` and `rivals` are references that optax does
not have.
"""

from experiments.optimizers.contenders import (
    Contender,
    build,
    diagnostics,
    learning_rate_schedule,
    literal,
)
from experiments.optimizers.gradients import GRADIENTS
from experiments.optimizers.optimizer import (
    UNKNOWN,
    Optimizer,
    Uses,
    dimension_numbers,
    kernels,
)
from experiments.optimizers.table import NAMED, OPTIMIZERS

__all__ = [
    "GRADIENTS",
    "NAMED",
    "OPTIMIZERS",
    "UNKNOWN",
    "Contender",
    "Optimizer",
    "Uses",
    "build",
    "diagnostics",
    "dimension_numbers",
    "kernels",
    "learning_rate_schedule",
    "literal",
]
