"""Optax gradient transformations on eigenspaces.

`projection` projects on them, `decay` damps along their sharpest directions, `dsbp` is
the ready optimizer of both. `whitening` divides by their spectrum, `muon` is the ready
optimizer of it. `subspace` runs other optimizers in them, `sam` and `spectral_sam`
perturb in them, `lie` rotates in them, `transfer` protects what a source task needs,
and `track` only watches. The spectral state that they share, and how it is kept fresh,
is `tracking`'s. Nothing here looks at a model: what a kernel means comes in as a
`Layout`, what it saw as activations.

A guide. The params and gradients of a model go in and out as with any Optax
transformation; `spectral_muon` is the one to begin with:

  >>> import jax, jax.numpy as jnp, optax, dsbp_jax
  >>> def forward(params, x):
  ...     hidden = jax.nn.relu(x @ params["up"] + params["bias"])
  ...     return jax.nn.relu(hidden @ params["mid"]) @ params["head"]
  >>> def loss_fn(params, x, y):
  ...     return jnp.mean((forward(params, x) - y) ** 2)
  >>> keys = jax.random.split(jax.random.key(0), 5)
  >>> normal = lambda key, a, b: jax.random.normal(key, (a, b)) / a**0.5
  >>> params = {"up": normal(keys[0], 12, 24), "bias": jnp.zeros(24),
  ...           "mid": normal(keys[1], 24, 24), "head": normal(keys[2], 24, 3)}
  >>> x, y = normal(keys[3], 64, 12), normal(keys[4], 64, 3)
  >>> grads = jax.grad(loss_fn)(params, x, y)
  >>> hidden = dsbp_jax.roles(forward, params, x)
  >>> tx = dsbp_jax.spectral_muon(3e-3, rank=4, hidden=hidden)
  >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)

Its core is `spectral_whitening`, which divides whatever reaches it by a power of its
own spectrum, so that it chains:

  >>> tx = optax.chain(optax.trace(0.95), dsbp_jax.spectral_whitening(4, power=0.75),
  ...                  optax.scale(-0.02))

Few columns are enough: with 32 of 512 a network reached the loss of the exact polar
factor, with 8 it came near; what costs is an old basis (table `columns` of
experiments), so `refresh_every` is 1 by default.

The paper's way round keeps the leading eigenspace: `spectral_projection`, with a share
κ = `residual` of the rest, and `dsbp`, the ready optimizer. At κ = 0 it is the paper's
projection, which by itself does not reach the base optimizer's loss; at κ = 1 it is
the base optimizer, bit for bit. `spectral_subspace` runs any optimizer on coordinates
in the eigenspace, its state `rank / d` of the usual:

  >>> tx = dsbp_jax.spectral_subspace(optax.adam(3e-3), rank=4, residual=0.1)
  >>> tx = dsbp_jax.dsbp(0.1, rank=4, residual=0.1)
  >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)

What a basis holds is read from the state of any optimizer, however it is wrapped, and
an eigenspace carries its label (leaf, axes, side, source), so that other methods take
it as it is:

  >>> sorted(dsbp_jax.diagnostics(state))
  ['mid', 'up']
  >>> spaces = dsbp_jax.eigenspaces(state)
  >>> value_and_grad = lambda params: jax.value_and_grad(loss_fn)(params, x, y)
  >>> sharp = dsbp_jax.sam_value_and_grad(value_and_grad, 0.05, mode="spectral",
  ...                                     bases=spaces)
  >>> value, grads = jax.jit(sharp)(params)

SAM as a transformation takes the gradient at another point from `grad_fn`, as
`optax.contrib.sam` does; around an optimizer that tracks bases it perturbs in those:

  >>> tx = dsbp_jax.spectral_sam(dsbp_jax.dsbp(0.1, rank=4), rho=0.05)
  >>> grad_fn = lambda params, i: jax.grad(loss_fn)(params, x, y)
  >>> @jax.jit
  ... def step(params, state):
  ...     grads = grad_fn(params, 0)
  ...     updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
  ...     return optax.apply_updates(params, updates), state
  >>> new_params, state = step(params, tx.init(params))

Fine-tuning that spares a source task: a penalty on what source data would notice, or
no step at all in its eigenspaces:

  >>> _, activations = dsbp_jax.capture_activations(forward)(params, x)
  >>> source = dsbp_jax.activation_bases(activations, rank=4)
  >>> tx = optax.chain(dsbp_jax.add_spectral_transfer(1e-2, params, source),
  ...                  optax.adam(1e-3))
  >>> tx = optax.chain(optax.adam(1e-3), dsbp_jax.project_away(source))

Kernels that only turn keep their singular values; `optax.partition` leaves the rest
to another optimizer:

  >>> labels = {"up": "turn", "bias": "adam", "mid": "turn", "head": "adam"}
  >>> tx = optax.partition({"turn": dsbp_jax.lie_rotation(0.05, rank=4),
  ...                       "adam": optax.adam(1e-3)}, labels)

A kernel of more than two axes is a matrix by its `layout`; under
`optax.inject_hyperparams` pass `static_args=dsbp_jax.STATIC_ARGS`. A training step may
time refreshes itself: `update(..., refresh=True)` refreshes every leaf, and
`refresh=False` compiles a step without any.
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
