"""Spectral architecture optimization: models that really are smaller.

`groups` finds which axes of a model's leaves can be cut together, from how the function
uses them; `plan` measures how wide each needs to be; `compress` cuts, and runs the
function on the smaller leaves; `factorize` splits kernels that have no width to
cut. Nothing is registered and no module is rewritten. The
formulas stand in `METHODS.md`, section 10. Training loops, rivals and figures belong to
`experiments`.

A guide. `params` are all arrays that the function needs, running averages too:

  >>> import jax, jax.numpy as jnp
  >>> from dsbp_jax import architecture
  >>> def model(params, x):
  ...     hidden = jax.nn.relu(x @ params["up"] + params["bias"])
  ...     return jax.nn.gelu(hidden @ params["mid"]) @ params["down"]
  >>> keys = jax.random.split(jax.random.key(0), 4)
  >>> normal = lambda key, a, b: jax.random.normal(key, (a, b)) / a**0.5
  >>> params = {"up": normal(keys[0], 16, 32), "bias": jnp.zeros(32),
  ...           "mid": normal(keys[1], 32, 24), "down": normal(keys[2], 24, 4)}
  >>> x = jax.random.normal(keys[3], (256, 16))
  >>> groups = architecture.groups(model, params, x)  # prints as a table
  >>> plan = architecture.plan(model, params, [x], flops=0.5)  # and so does this
  >>> plan.flops <= 0.5
  True
  >>> small = architecture.compress(model, params, plan)
  >>> outputs = jax.jit(small.apply)(small.params, x)  # fine-tune with any optimizer
  >>> outputs.shape, small.params["mid"].size < params["mid"].size
  ((256, 4), True)

What the outputs lose with a width is measured, and widths are shared out by it. Neurons
are chosen by what the outputs feel of the next layer's answers, and its kernel is
repaired by least squares; constants go into the next bias, and between linear maps
directions are cut in place of neurons. Of a network that trains in another mode than it
runs in, `resized(train_fn, params, plan.cuts)` is that mode at the smaller sizes: to
tune it, or, under batch normalisation, to take running means and variances anew from a
few batches, without labels, as a cut model needs. In place of `flops`,
`energy=` keeps so much of each spectrum, and `latency=` with `batch_sizes=` goes by the
clock: a plan that is not faster is refused. Where the function itself runs on the
smaller leaves, `small.report.same_function` says so. Widths of MLPs and convolutional
networks are cut, and inside attention the features of each head; of widths that
LayerNorm sums over copies are merged, dead entries among them, and nothing else goes;
GroupNorm's stay, and so does the number of heads. `factorize(model, params, batches,
energy=0.99)` splits kernels instead, for what has no width to cut.
"""

from dsbp_jax.architecture.compression import (
    Compressed as Compressed,
    Report as Report,
    compress as compress,
    resized as resized,
)
from dsbp_jax.architecture.factorization import factorize as factorize
from dsbp_jax.architecture.groups import (
    Group as Group,
    Groups as Groups,
    groups as groups,
)
from dsbp_jax.architecture.planning import plan as plan
from dsbp_jax.architecture.plans import GroupPlan as GroupPlan, Plan as Plan
