"""The spectral state: an eigenspace per layer, kept fresh, and its label.

`tracker` says what is followed, `schedule` when, `refresh` does one solve (of bases as
`packing` has them), `signals` are what bases follow. `following` follows updates
themselves, without lag, for the filters of `spectral_filter`. `eigenspace` is what
everything else in the package consumes: a basis that knows its leaf's axes and its
side, and the only place that multiplies by it; `labels` makes one of what users pass as
bases. `transform` builds Optax transformations on it, `transport` moves an optimizer's
moments from one basis to the next, `reading` finds eigenspaces in any optimizer state,
`solved` makes them without tracking, `leaves` is the gate that leaves pass. Methods
that use them live in `transforms` and `backprop`.
"""

from dsbp_jax.tracking.eigenspace import (
    SIDES as SIDES,
    Eigenspace as Eigenspace,
    Number as Number,
    common_dtype as common_dtype,
    from_coordinates as from_coordinates,
    in_dtype as in_dtype,
    project as project,
    rotation as rotation,
    to_coordinates as to_coordinates,
    wide as wide,
)
from dsbp_jax.tracking.following import (
    Followed as Followed,
    as_matrices as as_matrices,
    follow_updates as follow_updates,
    squared_norm as squared_norm,
)
from dsbp_jax.tracking.labels import (
    Spaces as Spaces,
    as_spaces as as_spaces,
    describe as describe,
    labelled as labelled,
    require_some as require_some,
)
from dsbp_jax.tracking.leaves import (
    LayoutLike as LayoutLike,
    array_leaves as array_leaves,
    check_layout as check_layout,
    is_placeholder as is_placeholder,
    matrix_views as matrix_views,
)
from dsbp_jax.tracking.reading import (
    Diagnostics as Diagnostics,
    bases as bases,
    diagnostics as diagnostics,
    eigenspaces as eigenspaces,
    map_spectral_states as map_spectral_states,
    spectral_states as spectral_states,
)
from dsbp_jax.tracking.refresh import (
    Refresh as Refresh,
    refresh_due as refresh_due,
)
from dsbp_jax.tracking.schedule import take_turns as take_turns
from dsbp_jax.tracking.signals import (
    Signal as Signal,
    activation_signal as activation_signal,
    gradient_signal as gradient_signal,
    product_signal as product_signal,
)
from dsbp_jax.tracking.solved import activation_bases as activation_bases
from dsbp_jax.tracking.spectral_filter import (
    Factors as Factors,
    SpectralFilter as SpectralFilter,
    nearly_diagonal as nearly_diagonal,
    whole_space as whole_space,
)
from dsbp_jax.tracking.tracked_basis import TrackedBasis as TrackedBasis
from dsbp_jax.tracking.tracker import (
    SOURCES as SOURCES,
    STATIC_ARGS as STATIC_ARGS,
    MissingActivations as MissingActivations,
    SpectralState as SpectralState,
    Tracker as Tracker,
    empty_state as empty_state,
    static_args as static_args,
)
from dsbp_jax.tracking.transform import (
    Step as Step,
    require_params as require_params,
    tracked as tracked,
)
from dsbp_jax.tracking.transport import (
    Coordinate as Coordinate,
    Rule as Rule,
    transport_moments as transport_moments,
)
