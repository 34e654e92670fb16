"""Optax gradient transformations on eigenbases, and the state they share.

`tracking` keeps one `SpectralState` fresh (`signals` is what its bases follow) and
`reading` finds it in any optimizer state; `projection`, `decay` and the ready
optimizer `dsbp` of `alias` use it, under any mesh by `sharding`. `subspace` runs other
optimizers in it, whose moments `transport` moves with the bases. `sam` is an estimator
of gradients, not a transformation. Nothing here looks at a model: what a kernel means
comes in as a `Layout`, what it saw as activations.
"""

from dsbp_jax.transforms.alias import DsbpState as DsbpState, dsbp as dsbp
from dsbp_jax.transforms.decay import add_spectral_decay as add_spectral_decay
from dsbp_jax.transforms.projection import (
    spectral_projection as spectral_projection,
)
from dsbp_jax.transforms.reading import (
    Diagnostics as Diagnostics,
    bases as bases,
    diagnostics as diagnostics,
)
from dsbp_jax.transforms.sam import sam_value_and_grad as sam_value_and_grad
from dsbp_jax.transforms.subspace import (
    SubspaceState as SubspaceState,
    spectral_subspace as spectral_subspace,
)
from dsbp_jax.transforms.tracking import (
    STATIC_ARGS as STATIC_ARGS,
    SpectralState as SpectralState,
    TrackedBasis as TrackedBasis,
)
