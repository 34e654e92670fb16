"""Dynamic spectral inference: a model that meets data which drift.

`fit` keeps what each layer meets on source data: a mean, a few eigenpairs and a tail.
`adapt` gives a deployed model's outputs batch after batch: it follows the same numbers
on the stream, measures how far they are apart (`drift`), and where they are, moves the
inputs of a few layers back by the map between the two, without gradients and in the
same forward pass. A guard hands out the plain model's answers wherever the moved ones
look no better. The formulas stand in `METHODS.md`, section 11. Streams, rivals and
figures belong to `experiments`.

A guide. Any function of params and a batch of examples will do; `params` are all arrays
that it needs, running averages too. One pass over data like those it was trained on:

  >>> import jax, jax.numpy as jnp
  >>> from dsbp_jax import inference
  >>> def model(params, x):
  ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
  >>> keys = jax.random.split(jax.random.key(0), 3)
  >>> params = {"up": jax.random.normal(keys[0], (6, 16)),
  ...           "down": jax.random.normal(keys[1], (16, 4)) / 4}
  >>> x = jax.random.normal(keys[2], (16, 64, 6))
  >>> source = inference.fit(model, params, list(x))

At inference the state goes from batch to batch; each is answered as before for as long
as there is no alarm:

  >>> step = jax.jit(lambda state, x: inference.adapt(model, params, source, state, x))
  >>> state = inference.init(source)
  >>> for batch in x[:4]:
  ...     outputs, state = step(state, batch)
  >>> bool(inference.drift(source, state).alarm), bool(state.adapted)
  (False, False)
  >>> for batch in x[4:]:
  ...     outputs, state = step(state, 0.5 * batch + 3)
  >>> drift = inference.drift(source, state)
  >>> bool(drift.alarm), sorted(drift.layers)
  (True, ['down', 'up'])

For the alarm alone, `fit(..., layers=())` moves nothing. A source and a state are
ordinary pytrees: of each layer a mean and `Settings.rank` directions of its inputs, and
in a state as many examples as drift is measured of at a time.
"""

from dsbp_jax.inference.adapting import (
    State as State,
    adapt as adapt,
    drift as drift,
    init as init,
)
from dsbp_jax.inference.guard import Guard as Guard
from dsbp_jax.inference.measures import Drift as Drift
from dsbp_jax.inference.settings import Settings as Settings
from dsbp_jax.inference.shifts import SHIFTS as SHIFTS
from dsbp_jax.inference.source import Source as Source, fit as fit
