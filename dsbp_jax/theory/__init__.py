"""The paper's two theory claims as code that runs: what is proved of spectral training.

`sde` writes an optimizer as a stochastic differential equation, to a chosen order in
the SAM radius, and puts its paths and moments beside the optimizer's own; integrating
it needs the extra `theory`. `pac_bayes` bounds the error of a network whose weights are
noisy, narrow along each layer's eigenspace and wide elsewhere. Nothing here trains
anything faster. The formulas and their sources stand in `METHODS.md`, section 9.

A guide to the first: the drift of SAM's equation at a point, and whether the expansion
may be trusted for so large a radius:

  >>> import jax, jax.numpy as jnp
  >>> from dsbp_jax.theory import pac_bayes, sde
  >>> loss_fn = lambda w, x: 0.5 * x * w**2
  >>> batches = jnp.array([1.0, 3.0])
  >>> equation = sde.modified_equation(loss_fn, sde.sam(0.5), 0.1)
  >>> drift = equation.drift(jnp.array(2.0), batches)
  >>> bool(sde.validity(equation, jnp.array(2.0), batches).stiffness < 1)
  True

And to the second: a posterior about a trained model, and what it certifies:

  >>> params, examples = {"w": jnp.array([2.0, -1.0])}, jnp.ones((10_000, 2))
  >>> errs = lambda params, x: (x @ params["w"] < 0).astype(jnp.float32)
  >>> family = pac_bayes.isotropic()  # or pac_bayes.eigenbasis(spaces)
  >>> prior = pac_bayes.initial_prior({"w": jnp.zeros(2)}, 1.0)
  >>> found = pac_bayes.certify(errs, family, family.init(params, 0.1), prior, examples,
  ...                           indices=range(10_000), key=jax.random.key(0))
  >>> found.empirical <= found.bound < 0.02
  True
"""

from dsbp_jax.theory import pac_bayes as pac_bayes, sde as sde
