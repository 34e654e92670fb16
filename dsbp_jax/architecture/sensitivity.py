"""What the outputs feel of a change in what a layer answers.

With random signs u for every output, `g` the cotangent that they have at a layer's
answers, small changes δ of these, uncorrelated between rows, change the outputs by
`Σ δᵀGδ` in mean square, `G = Σ ggᵀ` over rows: the output factor of K-FAC's
approximation to the Gauss-Newton matrix of ½‖outputs‖². In this metric neurons are
chosen: by what the outputs lose with them and not by what the next layer does.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.layers import Interpreter, Site, array_leaves, bind, plan_of

_TOGETHER = 32  # examples whose derivatives are held at once
_LEAST, _MOST = 8, 256  # in all: those that there are twice, within these bounds
_DENSE = 256  # widest answers whose G is formed
_COLUMNS = 64  # of the sketch of a wider one


def sensitivity(
    structure_of: Callable[[Any], AxisTrace],
    names: Sequence[str],
    params: Any,
    batch: Any,
) -> dict[str, np.ndarray]:
    """What the outputs feel of some layers' answers.

    Args:
      structure_of: Traces the function on a batch.
      names: Those of the layers.
      params: The parameters.
      batch: Arrays whose leading axis is the batch; some of its examples are taken.

    Returns:
      By layer R with `RRᵀ = G`, or in the mean so, shape `(*batch, d_out, r)`; empty
      where the function has no derivative, or one that is not of all of these layers.
    """
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
    count = max(min(sizes, default=1), 1)
    together = min(count, _TOGETHER)

    def some(at: int) -> Any:
        part = lambda leaf: leaf[at : at + together] if np.ndim(leaf) else leaf
        return jax.tree.map(part, batch)

    structure = structure_of(some(0))
    sites = {site.name: site for site in structure.traced.sites}
    layers = [sites[name] for name in dict.fromkeys(names)]
    if any(site.rule is not None or not site.carries_gradient for site in layers):
        return {}
    program = _program(structure, layers)
    total = {site.name: np.zeros(()) for site in layers}
    starts = itertools.cycle(range(0, count - together + 1, together))
    wanted = min(max(2 * count, _LEAST), _MOST)
    for number in range(-(-wanted // together)):
        arrays = array_leaves((params, some(next(starts))))
        try:
            found = program(arrays, number)
        except Exception:  # whatever a rule, or a loop without a reverse, raises
            return {}
        total = {name: total[name] + np.asarray(one) for name, one in found.items()}
    if not any(one.any() for one in total.values()):
        return {}
    return {name: _root(one) for name, one in total.items()}


def _root(found: np.ndarray) -> np.ndarray:
    """R of a `G` that was formed; a sketch is one already."""
    if found.shape[-1] != found.shape[-2]:
        return found
    values, vectors = np.linalg.eigh(found)
    return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(
    gather: Callable[[jax.Array], jax.Array], y: jax.Array, felt: jax.Array
) -> jax.Array:
    """A response as it is; the cotangent of `felt` is what `gather` makes of its."""
    del gather, felt
    return y


_probe.defvjp(
    lambda gather, y, felt: (y, None),
    lambda gather, _, cotangent: (cotangent, gather(cotangent)),
)


def _of_rows(site: Site, cotangent: jax.Array) -> jax.Array:
    """`ggᵀ` summed over rows, shape `(*batch, d_out, d_out)`; or a sketch of its root.

    Columns of the sketch are sums of g with random signs.
    """
    rows = site.outputs.to_rows(cotangent.astype(jnp.float32))
    if rows.shape[-1] <= _DENSE:
        other = rows
    else:
        shape = (rows.shape[-2], _COLUMNS)
        other = jax.random.rademacher(jax.random.key(0), shape, jnp.float32)
        other = jnp.broadcast_to(other, (*rows.shape[:-1], _COLUMNS))
    return jnp.einsum("...na,...nb->...ab", rows, other, precision="highest")


class _Probing(Interpreter):
    """Runs the function as it is, with a probe at each answer."""

    def __init__(self) -> None:
        super().__init__(lambda product, x, w, extra: (product(x, w), None))

    def product(
        self, equation: Any, sites: Any, values: Sequence[Any], extras: Any
    ) -> Any:
        (result,) = bind(equation, values)
        for site in sites:
            gather = functools.partial(_of_rows, site)
            result = _probe(gather, result, extras[site.name])
        return [result], {}


def _program(
    structure: AxisTrace, layers: Sequence[Site]
) -> Callable[[Sequence[Any], int], dict[str, jax.Array]]:
    """From array leaves and a seed to what is felt."""
    start = {}
    for site in layers:
        *_, width = site.view.matrix_shape(site.shape)
        columns = width if width <= _DENSE else _COLUMNS
        start[site.name] = jnp.zeros((*site.batch_shape, width, columns))

    def answered(
        felt: Mapping[str, jax.Array], arrays: Sequence[Any], seed: int
    ) -> jax.Array:
        local = {site.name: site.scatter(felt[site.name]) for site in layers}
        body, plan = structure.traced.body, plan_of(layers)
        outputs, _ = _Probing().run(body, arrays, plan, local, 0)
        outputs = [one for one in outputs if jnp.issubdtype(one.dtype, jnp.floating)]
        keys = jax.random.split(jax.random.key(seed), max(len(outputs), 1))
        signed = jnp.zeros(())
        for key, output in zip(keys, outputs, strict=False):
            signs = jax.random.rademacher(key, output.shape, jnp.float32)
            signed += jnp.sum(signs * output.astype(jnp.float32))
        return signed

    return jax.jit(lambda arrays, seed: jax.grad(answered)(start, arrays, seed))
