"""Optax gradient transformations on eigenbases, and the state they share.

`tracking` keeps one `SpectralState` fresh (`signals` is what its bases follow,
`refreshing` what a refresh does), `reading` finds it in any optimizer state, and
`sharing` hands it to another one;
`projection`, `decay` and the ready optimizer `dsbp` of `alias` use it, under any mesh
by `sharding`. `subspace` runs other optimizers in it, whose moments `transport` moves
with the bases; `sam` perturbs in it and `lie` rotates in it. `transfer` protects what a
source task needs, by bases that are `fixed`. Nothing here looks at a model: what a
kernel means comes in as a `Layout`, what it saw as activations.
"""

from dsbp_jax.transforms.alias import DsbpState as DsbpState, dsbp as dsbp
from dsbp_jax.transforms.decay import add_spectral_decay as add_spectral_decay
from dsbp_jax.transforms.fixed import activation_bases as activation_bases
from dsbp_jax.transforms.lie import LieState as LieState, lie_rotation as lie_rotation
from dsbp_jax.transforms.projection import (
    spectral_projection as spectral_projection,
)
from dsbp_jax.transforms.reading import (
    Diagnostics as Diagnostics,
    bases as bases,
    diagnostics as diagnostics,
)
from dsbp_jax.transforms.sam import (
    SamState as SamState,
    sam_value_and_grad as sam_value_and_grad,
    spectral_sam as spectral_sam,
)
from dsbp_jax.transforms.sharing import (
    track_bases as track_bases,
    with_bases as with_bases,
)
from dsbp_jax.transforms.subspace import (
    SubspaceState as SubspaceState,
    spectral_subspace as spectral_subspace,
)
from dsbp_jax.transforms.tracking import (
    STATIC_ARGS as STATIC_ARGS,
    MissingActivations as MissingActivations,
    SpectralState as SpectralState,
    TrackedBasis as TrackedBasis,
)
from dsbp_jax.transforms.transfer import (
    SourceState as SourceState,
    add_spectral_transfer as add_spectral_transfer,
    project_away as project_away,
    spectral_transfer_penalty as spectral_transfer_penalty,
)
