"""Spectral architecture optimization: models that really are smaller.

`groups` finds which axes of a model's leaves can be cut together, from how the function
uses them; `plan` measures how wide each needs to be; `compress` cuts, and runs the
function on the smaller leaves; `factorize` splits kernels that have no width to
cut. Nothing is registered and no module is rewritten. The
formulas stand in `METHODS.md`, section 10. Training loops, rivals and figures belong to
`experiments`.
"""

from dsbp_jax.architecture.compression import (
    Compressed as Compressed,
    Report as Report,
    compress as compress,
)
from dsbp_jax.architecture.factorization import factorize as factorize
from dsbp_jax.architecture.groups import (
    Group as Group,
    Groups as Groups,
    groups as groups,
)
from dsbp_jax.architecture.planning import plan as plan
from dsbp_jax.architecture.plans import GroupPlan as GroupPlan, Plan as Plan
