"""Optax gradient transformations on eigenspaces.

`projection` projects on them, `decay` damps along their sharpest directions, `dsbp` is
the ready optimizer of both. `whitening` divides by their spectrum, `muon` is the ready
optimizer of it. `subspace` runs other optimizers in them, `sam` and `spectral_sam`
perturb in them, `lie` rotates in them, `transfer` protects what a source task needs,
and `track` only watches. The spectral state that they share, and how it is kept fresh,
is `tracking`'s. Nothing here looks at a model: what a kernel means comes in as a
`Layout`, what it saw as activations.
"""

from dsbp_jax.transforms.decay import add_spectral_decay as add_spectral_decay
from dsbp_jax.transforms.dsbp import DsbpState as DsbpState, dsbp as dsbp
from dsbp_jax.transforms.lie import LieState as LieState, lie_rotation as lie_rotation
from dsbp_jax.transforms.muon import (
    WHITENED as WHITENED,
    spectral_muon as spectral_muon,
)
from dsbp_jax.transforms.projection import (
    spectral_projection as spectral_projection,
)
from dsbp_jax.transforms.sam import (
    projected as projected,
    sam_value_and_grad as sam_value_and_grad,
)
from dsbp_jax.transforms.spectral_sam import (
    SamState as SamState,
    spectral_sam as spectral_sam,
)
from dsbp_jax.transforms.subspace import (
    SubspaceState as SubspaceState,
    spectral_subspace as spectral_subspace,
)
from dsbp_jax.transforms.track import (
    track_bases as track_bases,
    with_bases as with_bases,
)
from dsbp_jax.transforms.transfer import (
    SourceState as SourceState,
    add_spectral_transfer as add_spectral_transfer,
    project_away as project_away,
    spectral_transfer_penalty as spectral_transfer_penalty,
)
from dsbp_jax.transforms.whitening import (
    by_layer as by_layer,
    spectral_whitening as spectral_whitening,
)
