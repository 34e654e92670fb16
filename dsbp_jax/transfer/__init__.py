"""From one task to the next: what a trained model needs when it is tuned for another.

Here live low-rank adapters that start in the eigenspaces of a layer (`spectral_lora`),
and what is kept of a source task (`Source`): its kernels and the eigenspaces of its
activations, saved, loaded, and merged with those of other tasks. The penalty and the
projection that use them while all kernels are trained are transformations, and live
in `transforms`.

A guide. A model is tuned for a task of which few examples are at hand; what it did on
the source is to stay. At the end of the first training keep what its layers saw:

  >>> import jax, jax.numpy as jnp, optax, dsbp_jax
  >>> def model(params, x):
  ...     return jnp.tanh(x @ params["up"]) @ params["down"]
  >>> keys = jax.random.split(jax.random.key(0), 4)
  >>> params = {"up": jax.random.normal(keys[0], (32, 24)) / 6,
  ...           "down": jax.random.normal(keys[1], (24, 4)) / 5}
  >>> source_x = jax.random.normal(keys[2], (256, 32)) * 0.8 ** jnp.arange(32)
  >>> capture = dsbp_jax.capture_activations(model, which=("inputs",))
  >>> _, seen = capture(params, source_x)
  >>> bases = dsbp_jax.activation_bases(seen, rank=8)

Adapters outside of these eigenspaces change nothing of the answers to inputs inside:

  >>> lora = dsbp_jax.spectral_lora(
  ...     model, rank=4, start="null", train="output", source_bases=bases)
  >>> target_x = jax.random.normal(keys[3], (64, 32)) * 0.8 ** jnp.arange(32)[::-1]
  >>> adapters, frame = lora.init(params, target_x, key=jax.random.key(1))
  >>> def loss_fn(adapters, x, y):
  ...     return jnp.mean((lora.apply(adapters, frame, x) - y) ** 2)
  >>> tx = optax.adam(0.02)
  >>> state, step = tx.init(adapters), jax.jit(jax.value_and_grad(loss_fn))
  >>> losses = []
  >>> for _ in range(20):
  ...     value, grads = step(adapters, target_x, jnp.ones((64, 4)))
  ...     updates, state = tx.update(grads, state, adapters)
  ...     adapters = optax.apply_updates(adapters, updates)
  ...     losses.append(float(value))
  >>> losses[-1] < 0.9 * losses[0]
  True
  >>> tuned = lora.merge(adapters, frame)
  >>> change = lambda x: jnp.mean((model(tuned, x) - model(params, x)) ** 2)
  >>> bool(change(source_x) < 0.01 * change(target_x))
  True
"""

from dsbp_jax.transfer.adapters import (
    Adapter as Adapter,
    AdapterFrame as AdapterFrame,
    SpectralLora as SpectralLora,
    spectral_lora as spectral_lora,
)
from dsbp_jax.transfer.source import (
    Source as Source,
    load_source as load_source,
    merge_bases as merge_bases,
    save_source as save_source,
)
