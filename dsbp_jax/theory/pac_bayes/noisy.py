"""A loss under noisy weights, with the noise moved to where it is cheap.

Where every example meets a kernel once, `XW` with W drawn anew for each example is
Gaussian, and its mean and deviation are two thin products away: no kernel is drawn, and
examples are independent of each other. This is the local reparametrisation of [P:
Kingma, Salimans and Welling 2015]. All other leaves (biases, convolutions, kernels that
are used twice) are drawn once for all examples of a call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.layers import Product, Site, Trace, array_leaves, evaluate, trace
from dsbp_jax.theory.pac_bayes.gaussian import Family, Gaussian


def noisy(
    loss_fn: Callable[..., jax.Array],
    family: Family,
    posterior: Gaussian,
    key: jax.Array,
    batch: Any,
) -> jax.Array:
    """Losses under draws from a posterior.

    Args:
      loss_fn: `(params, batch) -> ` losses `(b,)`, each of its own example alone.
      family: The posterior's form.
      posterior: Q.
      key: A PRNG key.
      batch: Examples, on a leading axis of b in all leaves.

    Returns:
      Losses whose mean, over keys, is that under Q. Those of one call share the draw
      of the leaves that are not used in the plain way.

    Raises:
      ValueError: `loss_fn` does not return one loss for each example.

    Example:
      >>> from dsbp_jax.theory import pac_bayes
      >>> family = pac_bayes.isotropic()
      >>> posterior = family.init({"w": jnp.zeros((1, 1))}, 2.0)
      >>> loss_fn = lambda params, x: (x @ params["w"])[:, 0]
      >>> losses = noisy(loss_fn, family, posterior, jax.random.key(0),
      ...                jnp.ones((10_000, 1)))
      >>> round(float(losses.std()), 1)
      2.0
    """
    size = len(jax.tree.leaves(batch)[0])
    traced = trace(loss_fn, posterior.mean, (batch,), {})
    if getattr(traced.out, "shape", None) != (size,):
        raise ValueError(
            f"loss_fn must return one loss for each of {size} examples, got "
            f"{jax.tree.map(lambda x: x.shape, traced.out)}"
        )
    plain = {
        site.path: site
        for site in traced.sites
        if _is_plain(site, traced, size)
        and _has_deviation(family, posterior, site, size)
    }
    drawn, *keys = jax.random.split(key, 1 + len(plain))
    keys_of = dict(zip(plain, keys, strict=True))
    params = family.sample(posterior, drawn, plain)

    def visit(
        product: Product, x: jax.Array, w: jax.Array, extra: Any
    ) -> tuple[jax.Array, None]:
        del extra
        y, path = product(x, w), product.site.path
        deviation = family.deviation(posterior, path, product.site.inputs.to_rows(x))
        assert deviation is not None
        noise = jax.random.normal(keys_of[path], y.shape, y.dtype)
        return y + deviation.astype(y.dtype) * noise, None

    arrays = array_leaves((params, (batch,), {}))
    outputs, _ = evaluate(traced, visit, arrays, sites=plain.values())
    return traced.unflatten(outputs)


def _is_plain(site: Site, traced: Trace, size: int) -> bool:
    """Whether each example meets a leaf once, as `(b, d_in)` times the leaf."""
    leaf = traced.leaves[site.path]
    uses = [one for one in traced.sites if one.path == site.path]
    whole = {((axis, 1, length, False),) for axis, length in enumerate(leaf.shape)}
    return (
        len(uses) == 1
        and all(use.path != site.path for use in traced.uses)
        and site.kind == "dense"
        and site.rule is None
        and not site.conditional
        and not site.lengths
        and len(leaf.shape) == 2
        and site.view.input_axes == (0,)
        and {tuple(map(tuple, axis)) for axis in site.weight.axes} == whole
        and not site.weight.spans
        and len(site.inputs.shape) == len(site.outputs.shape) == 2
        and site.inputs.rows == site.outputs.rows == (0,)
        and site.inputs.shape[0] == size
    )


def _has_deviation(family: Family, posterior: Gaussian, site: Site, size: int) -> bool:
    rows = jax.ShapeDtypeStruct(
        (size, int(np.prod(site.inputs.shape[1:]))), jnp.float32
    )
    found = jax.eval_shape(
        lambda rows: family.deviation(posterior, site.path, rows), rows
    )
    return found is not None
