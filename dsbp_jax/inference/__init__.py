"""Dynamic spectral inference: a model that meets data which drift.

`fit` keeps what each layer meets on source data: a mean, a few eigenpairs and a tail.
`adapt` gives a deployed model's outputs batch after batch: it follows the same numbers
on the stream, measures how far they are apart (`drift`), and where they are, moves the
inputs of a few layers back by the map between the two, without gradients and in the
same forward pass. A guard hands out the plain model's answers wherever the moved ones
look no better. The formulas stand in `METHODS.md`, section 11. Streams, rivals and
figures belong to `experiments`.
"""

from dsbp_jax.inference.adapting import (
    State as State,
    adapt as adapt,
    drift as drift,
    init as init,
)
from dsbp_jax.inference.guard import Guard as Guard
from dsbp_jax.inference.measures import Drift as Drift
from dsbp_jax.inference.settings import Settings as Settings
from dsbp_jax.inference.shifts import SHIFTS as SHIFTS
from dsbp_jax.inference.source import Source as Source, fit as fit
