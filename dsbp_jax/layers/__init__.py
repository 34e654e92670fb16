"""Layers, found by how a model uses its parameters.

Here lives everything that knows jaxprs: the walker that finds which parameter
meets which activations, the matrix view of a leaf that follows from it, the
canonical parameter paths, and the capture of activations. Nothing here knows
optimizers or eigenvalues.
"""

from dsbp_jax.layers.activations import LayerActivations as LayerActivations
from dsbp_jax.layers.capture import capture_activations as capture_activations
from dsbp_jax.layers.explain import (
    explain as explain,
    layout as layout,
)
from dsbp_jax.layers.paths import (
    canonical_path as canonical_path,
    leaves_by_path as leaves_by_path,
    map_paths as map_paths,
    require_paths as require_paths,
)
from dsbp_jax.layers.views import (
    Layout as Layout,
    MatrixView as MatrixView,
    guess_view as guess_view,
)
