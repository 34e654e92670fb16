"""The spectral state: eigenbases of layers, kept fresh."""

from dsbp_jax.tracking.eigenspace import (
    energy_mask as energy_mask,
    project_matrix as project_matrix,
)
from dsbp_jax.tracking.reading import (
    Diagnostics as Diagnostics,
    bases as bases,
    diagnostics as diagnostics,
    tracked_by_side as tracked_by_side,
)
from dsbp_jax.tracking.refresh import TrackedBasis as TrackedBasis
from dsbp_jax.tracking.signals import SIDES as SIDES
from dsbp_jax.tracking.solved import (
    activation_bases as activation_bases,
    check_bases as check_bases,
    project_on as project_on,
    require_some as require_some,
)
from dsbp_jax.tracking.tracker import (
    SOURCES as SOURCES,
    STATIC_ARGS as STATIC_ARGS,
    MissingActivations as MissingActivations,
    SpectralState as SpectralState,
    Tracker as Tracker,
    check_layout as check_layout,
    is_placeholder as is_placeholder,
    matrix_views as matrix_views,
)
from dsbp_jax.tracking.transport import (
    Coordinate as Coordinate,
    Rule as Rule,
    rotation as rotation,
    transport_moments as transport_moments,
)
