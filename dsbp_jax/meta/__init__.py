"""Few-shot meta-learning: starts from which a few steps of any optimizer suffice.

`maml` holds MAML, its first-order form, ANIL and Reptile; `learner` is what they have
in common, `adaptation` the inner loop on one task, `tasks` runs it on many, and
`patched` is the loss as it runs there. The formulas and their sources stand in
`METHODS.md`, section 6. Episodes, networks and training loops belong to `experiments`.
"""

from dsbp_jax.meta.adaptation import (
    WithRates as WithRates,
    plain_params as plain_params,
    with_rates as with_rates,
)
from dsbp_jax.meta.learner import Maml as Maml
from dsbp_jax.meta.maml import (
    anil as anil,
    maml as maml,
    reptile as reptile,
)
