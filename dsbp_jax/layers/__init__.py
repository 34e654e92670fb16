"""Layers, found by how a model uses its parameters.

Here lives everything that knows jaxprs: the walker that finds which parameter
meets which activations (`trace`), the matrix view of a leaf that follows from it, the
canonical parameter paths, the capture of activations, and the evaluation of a model
with its layers in other hands (`evaluate`). Nothing here knows optimizers or
eigenvalues.
"""

from dsbp_jax.layers.activations import LayerActivations as LayerActivations
from dsbp_jax.layers.arrays import split_arrays as split_arrays
from dsbp_jax.layers.capture import (
    capture_activations as capture_activations,
    capture_through as capture_through,
    capture_traced as capture_traced,
    collect_rows as collect_rows,
    gather_rows as gather_rows,
    subsample as subsample,
)
from dsbp_jax.layers.convolution import convolve as convolve, is_product as is_product
from dsbp_jax.layers.derivatives import (
    derivative as derivative,
    with_derivative as with_derivative,
)
from dsbp_jax.layers.finder import (
    Trace as Trace,
    array_leaves as array_leaves,
    trace as trace,
)
from dsbp_jax.layers.forward import Forward as Forward
from dsbp_jax.layers.layout import Layout as Layout, layout as layout
from dsbp_jax.layers.matrix_view import (
    MatrixView as MatrixView,
    guess_view as guess_view,
)
from dsbp_jax.layers.paths import (
    canonical_path as canonical_path,
    is_further_use as is_further_use,
    leaves_by_path as leaves_by_path,
    leaves_with_path as leaves_with_path,
    map_paths as map_paths,
    require_paths as require_paths,
    use_name as use_name,
)
from dsbp_jax.layers.primitives import (
    Body as Body,
    bind as bind,
    explicit_sharding as explicit_sharding,
    name_of as name_of,
    scan_sizes as scan_sizes,
)
from dsbp_jax.layers.product import Product as Product
from dsbp_jax.layers.rewrite import (
    Entered as Entered,
    Interpreter as Interpreter,
    evaluate as evaluate,
    plan_of as plan_of,
)
from dsbp_jax.layers.roles import roles as roles, roles_of as roles_of
from dsbp_jax.layers.sites import Site as Site
