"""Training steps that cost less: the projection inside the backward pass.

Here lives whatever replaces `jax.value_and_grad`: `sketch` returns ordinary gradients
through a sketch of each layer's inputs, `coordinates` trains kernels in the span of
such a sketch only (on a `frame`; `training` owns the loop), `columns` keeps the
columns of both, from what was `seen` of a layer. How a layer is found and its
equation rewritten is `layers`' work, what follows the gradient is any Optax optimizer.

A guide. A layer `Y = XW` pays for three large products in a step: `XW`, `ΔWᵀ` and the
weight gradient `XᵀΔ`. Both methods replace the third by thin ones, through a few
orthonormal columns V, for any model function:

  >>> import jax, jax.numpy as jnp, optax, dsbp_jax
  >>> def loss_fn(params, x, y):
  ...     hidden = jax.nn.relu(x @ params["up"])
  ...     hidden = jax.nn.relu(hidden @ params["mid"])
  ...     return jnp.mean((hidden @ params["down"] - y) ** 2)
  >>> keys = jax.random.split(jax.random.key(0), 5)
  >>> normal = lambda key, a, b: jax.random.normal(key, (a, b)) / a**0.5
  >>> params = {"up": normal(keys[0], 32, 64), "mid": normal(keys[1], 64, 64),
  ...           "down": normal(keys[2], 64, 8)}
  >>> x, y = normal(keys[3], 128, 32), normal(keys[4], 128, 8)

`spectral_training` is the form for Adam, or for whitened momentum, with all around it:
steps, folds, weight decay, parameters for evaluation. Its state is a pytree to save
and resume; in Flax, `loss_fn` calls `model.apply(params, x)` of linen, or
`nnx.merge(graphdef, params)(x)` of what `nnx.split(model, nnx.Param)` gave:

  >>> rate = optax.cosine_decay_schedule(3e-3, 40)
  >>> training = dsbp_jax.spectral_training(
  ...     loss_fn, optax.adam(rate), rank=8, learning_rate=rate, weight_decay=0.1)
  >>> state = training.init(params, x, y, key=jax.random.key(0))
  >>> for _ in range(40):
  ...     state, value = training.step(state, x, y)
  >>> bool(loss_fn(training.params(state), x, y) < loss_fn(params, x, y))
  True

An optimizer that works on matrices is told how coordinates are some, by a function
from the frame:

  >>> muon = lambda frame: dsbp_jax.spectral_muon(
  ...     rate, rank=4, hidden=list(frame.kernels),
  ...     layout=dsbp_jax.backprop.views(frame), sizes=dsbp_jax.backprop.sizes(frame))
  >>> whitened = dsbp_jax.spectral_training(loss_fn, muon, rank=8)

Beneath it, `spectral_coordinates` is pure functions for loops of one's own. Kernels
are held as `W₀ + VS` and S is trained: gradient, optimizer state and update are of size
`rank × d_out`. Every so many steps `fold` puts S into W₀, refreshes V on a part of a
batch, and moves the moments along:

  >>> training = dsbp_jax.spectral_coordinates(loss_fn, rank=8)
  >>> coords, frame = training.init(params, x, y, key=jax.random.key(0))
  >>> tx = optax.adam(3e-3)
  >>> @jax.jit
  ... def step(coords, frame, opt_state, x, y):
  ...     value, grads = training.value_and_grad(coords, frame, x, y)
  ...     updates, opt_state = tx.update(grads, opt_state, coords)
  ...     return optax.apply_updates(coords, updates), opt_state, value
  >>> fold = jax.jit(training.fold)
  >>> opt_state = tx.init(coords)
  >>> for i in range(1, 41):
  ...     coords, opt_state, value = step(coords, frame, opt_state, x, y)
  ...     if i % 20 == 0:
  ...         coords, frame, opt_state = fold(coords, frame, opt_state, x, y)
  >>> trained = training.merge(coords, frame)
  >>> bool(loss_fn(trained, x, y) < loss_fn(params, x, y))
  True

`spectral_backprop` is `jax.value_and_grad` with sketched weight gradients, the form
for SGD and momentum. Values, input gradients and every leaf that is not worth a sketch
stay exact, and the columns are refreshed as it goes:

  >>> backprop = dsbp_jax.spectral_backprop(loss_fn, rank=8)
  >>> state = backprop.init(params, x, y, key=jax.random.key(0))
  >>> value, grads, state = backprop.value_and_grad(params, state, x, y)

What lies outside of the columns is dropped by default. `catch_up(params, state, x, y,
every=T)` in place of every T-th step is exact and makes up for it; `random=` and
`residual=` add random columns (`residual=1.0` for unbiased gradients), `tracking=`
columns that follow the gradient. Adam on sketched gradients leaves the columns' span:
use coordinates with Adam. `dsbp_jax.explain(loss_fn, params, x, y, rank=8)` says which
leaves are sketched, what that saves, and why others keep their exact gradient. Every
use of a leaf that carries a gradient is projected alike (tied leaves, leaves used
twice, penalties); passes behind a `stop_gradient` are not taken for the layer.
"""

from dsbp_jax.backprop.coordinates import (
    Observed as Observed,
    SpectralCoordinates as SpectralCoordinates,
    spectral_coordinates as spectral_coordinates,
)
from dsbp_jax.backprop.cost import (
    other_uses as other_uses,
    sketch_flops as sketch_flops,
    step_cost as step_cost,
    thin_uses as thin_uses,
    why_plain as why_plain,
)
from dsbp_jax.backprop.frame import (
    Frame as Frame,
    sizes as sizes,
    views as views,
)
from dsbp_jax.backprop.kernels import (
    kernel_sum as kernel_sum,
    with_taps as with_taps,
)
from dsbp_jax.backprop.shrink import decay_since as decay_since
from dsbp_jax.backprop.sketch import (
    SketchState as SketchState,
    SpectralBackprop as SpectralBackprop,
    spectral_backprop as spectral_backprop,
)
from dsbp_jax.backprop.training import (
    SpectralTraining as SpectralTraining,
    TrainingState as TrainingState,
    spectral_training as spectral_training,
)
