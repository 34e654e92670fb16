"""Few-shot meta-learning: starts from which a few steps of any optimizer suffice.

`maml` holds MAML, its first-order form, ANIL and Reptile; `learner` is what they have
in common, `adaptation` the inner loop on one task, `tasks` runs it on many, and
`patched` is the loss as it runs there. The formulas and their sources stand in
`METHODS.md`, section 6. Episodes, networks and training loops belong to `experiments`.

A guide. `loss_fn(params, batch)` sees one task; batches of tasks have an axis in front:

  >>> import jax, jax.numpy as jnp, optax, dsbp_jax
  >>> from dsbp_jax import meta
  >>> def loss_fn(params, batch):
  ...     x, y = batch
  ...     return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)
  >>> def tasks(key):  # support and query sets of 8 tasks
  ...     slope = jax.random.normal(key, (8, 1, 1))
  ...     x = jax.random.uniform(key, (8, 20, 1))
  ...     return (x[:, :10], slope * x[:, :10]), (x[:, 10:], slope * x[:, 10:])
  >>> keys = jax.random.split(jax.random.key(0), 2)
  >>> start = {"in": jax.random.normal(keys[0], (1, 16)),
  ...          "out": jax.random.normal(keys[1], (16, 1)) / 4}
  >>> learner = meta.maml(loss_fn, optax.sgd(0.1), num_steps=3)
  >>> params = meta.with_rates(start)  # inner learning rates are learned as well
  >>> outer = optax.adam(3e-3)
  >>> state = outer.init(params)
  >>> @jax.jit
  ... def outer_step(params, state, key):
  ...     loss, grads = jax.value_and_grad(learner.meta_loss)(params, tasks(key))
  ...     updates, state = outer.update(grads, state, params)
  ...     return optax.apply_updates(params, updates), state, loss
  >>> params, state, loss = outer_step(params, state, jax.random.key(1))
  >>> curve = learner.curve(params, tasks(jax.random.key(2)))  # query loss by step
  >>> curve.shape
  (8, 4)

With a spectral inner optimizer a task adapts inside eigenspaces: those of its own
support set, or, as `bases=`, those that an outer `track_bases` carries over tasks:

  >>> inner = optax.chain(dsbp_jax.spectral_projection(4, residual=0.1), optax.sgd(0.1))
  >>> learner = meta.maml(loss_fn, inner, num_steps=3)
  >>> outer = optax.chain(dsbp_jax.track_bases(4), optax.adam(3e-3))
  >>> state = outer.init(start)
  >>> loss = learner.meta_loss(start, tasks(jax.random.key(1)),
  ...                          bases=dsbp_jax.eigenspaces(state))

The second order differentiates through the inner optimizer: give Adam an `eps_root`,
and line searches `first_order=True`, which is FOMAML. `num_steps` belongs to the
learner: for more steps at test time build a second one and give it the same params.
`checkpoint=True` saves memory over many inner steps; `task_axis="map"` runs tasks in
turn, a number so many at once; tasks that are sharded over a mesh are split over its
devices. `anil` takes `head=`, the paths that adapt. With bases that follow
activations, give the outer optimizer `activations=learner.activations(params, tasks)`.
On a CPU, convolutions whose kernel differs from task to task are computed as products
over patches, which `vmap` does not slow down, at the price of memory.
"""

from dsbp_jax.meta.adaptation import (
    WithRates as WithRates,
    plain_params as plain_params,
    with_rates as with_rates,
)
from dsbp_jax.meta.learner import Maml as Maml
from dsbp_jax.meta.maml import (
    anil as anil,
    maml as maml,
    reptile as reptile,
)
