"""Layers, found by how a model uses its parameters.

Here lives everything that knows jaxprs: the walker that finds which parameter
meets which activations (`trace`), the matrix view of a leaf that follows from it, the
canonical parameter paths, the capture of activations, and the evaluation of a model
with its layers in other hands (`evaluate`). Nothing here knows optimizers or
eigenvalues.

A guide. Which leaf is what follows from how the function uses it, whatever library it
was written with; `layout` gives transformations the matrix views of attention kernels,
convolutions and scanned stacks, and `roles` says what each leaf is for:

  >>> import jax, jax.numpy as jnp, dsbp_jax
  >>> def forward(params, x):
  ...     heads = jnp.einsum("nd,dhk->nhk", x, params["query"])
  ...     hidden = jax.nn.relu(jnp.einsum("nhk,hkd->nd", heads, params["out"]))
  ...     return hidden @ params["head"]
  >>> params = {"query": jnp.ones((16, 2, 8)), "out": jnp.ones((2, 8, 16)),
  ...           "head": jnp.ones((16, 10))}
  >>> x = jnp.ones((32, 16))
  >>> dsbp_jax.roles(forward, params, x)
  Roles({'head': 'head', 'out': 'hidden', 'query': 'first'})
  >>> dsbp_jax.layout(forward, params, x)["out"].input_axes
  (0, 1)
  >>> print(dsbp_jax.explain(forward, params, x, rank=4))  # doctest: +ELLIPSIS
  leaf ...
  head ...

`capture_activations` makes a model function return what its layers see, from the same
forward pass; a transformation with `source="activation"` takes it with the gradients:

  >>> def loss_fn(params, x, y):
  ...     outputs, seen = dsbp_jax.capture_activations(forward)(params, x)
  ...     return jnp.mean((outputs - y) ** 2), seen
  >>> grads, seen = jax.grad(loss_fn, has_aux=True)(params, x, jnp.zeros((32, 10)))
  >>> seen["out"].inputs.shape, seen["out"].outputs.shape
  ((32, 16), (32, 16))
  >>> tx = dsbp_jax.dsbp(0.1, rank=4, source="activation",
  ...                    layout=dsbp_jax.layout(forward, params, x))
  >>> updates, state = tx.update(grads, tx.init(params), params, activations=seen)

Leaves that the activations do not name keep their plain gradient. `nnx.Optimizer`
forwards `activations=`; linen's `TrainState.apply_gradients` does not, and needs a
subclass that passes `**extra` on to `tx.update`. Of linen capture
`lambda params, x: model.apply({"params": params}, x)`, so that paths are those of the
params.
"""

from dsbp_jax.layers.activations import LayerActivations as LayerActivations
from dsbp_jax.layers.arrays import (
    as_one_program as as_one_program,
    is_traced as is_traced,
    split_arrays as split_arrays,
)
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
from dsbp_jax.layers.roles import Roles as Roles, roles as roles, roles_of as roles_of
from dsbp_jax.layers.sites import Site as Site
