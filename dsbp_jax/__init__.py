"""Spectral training for JAX: one fresh eigenbasis per layer, used everywhere.

`linalg` keeps eigenbases of operators, `layers` finds what a model's kernels meet,
`tracking` joins the two in one spectral state. On it stand `transforms`, the Optax
gradient transformations, and `backprop`, which makes the gradient itself cheaper;
`meta` learns from where few steps suffice, `architecture` makes models smaller,
`transfer` tunes them without forgetting, `inference` meets data that drift, and
`theory` is what can be said of it all. Public names are re-exported here; those of
`linalg`, `tracking`, `meta`, `architecture`, `transfer`, `inference` and `theory` stay
behind their prefix.
"""

from dsbp_jax import (
    architecture as architecture,
    backprop as backprop,
    inference as inference,
    linalg as linalg,
    meta as meta,
    theory as theory,
    tracking as tracking,
    transfer as transfer,
)
from dsbp_jax.backprop import (
    Frame as Frame,
    SpectralBackprop as SpectralBackprop,
    SpectralCoordinates as SpectralCoordinates,
    SpectralTraining as SpectralTraining,
    decay_since as decay_since,
    spectral_backprop as spectral_backprop,
    spectral_coordinates as spectral_coordinates,
    spectral_training as spectral_training,
)
from dsbp_jax.explain import explain as explain
from dsbp_jax.layers import (
    LayerActivations as LayerActivations,
    Layout as Layout,
    MatrixView as MatrixView,
    Roles as Roles,
    capture_activations as capture_activations,
    layout as layout,
    roles as roles,
)
from dsbp_jax.tracking import (
    STATIC_ARGS as STATIC_ARGS,
    Diagnostics as Diagnostics,
    SpectralState as SpectralState,
    activation_bases as activation_bases,
    bases as bases,
    diagnostics as diagnostics,
    eigenspaces as eigenspaces,
    static_args as static_args,
)
from dsbp_jax.transfer import (
    SpectralLora as SpectralLora,
    spectral_lora as spectral_lora,
)
from dsbp_jax.transforms import (
    add_spectral_decay as add_spectral_decay,
    add_spectral_transfer as add_spectral_transfer,
    dsbp as dsbp,
    lie_rotation as lie_rotation,
    project_away as project_away,
    sam_value_and_grad as sam_value_and_grad,
    spectral_muon as spectral_muon,
    spectral_projection as spectral_projection,
    spectral_sam as spectral_sam,
    spectral_subspace as spectral_subspace,
    spectral_transfer_penalty as spectral_transfer_penalty,
    spectral_whitening as spectral_whitening,
    track_bases as track_bases,
    with_bases as with_bases,
)
