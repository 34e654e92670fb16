"""What the outputs feel of a change in what a layer answers.

With random signs u for every output, `g` the cotangent that they have at a layer's
answers, small changes δ of these, uncorrelated between rows, change the outputs by
`Σ δᵀGδ` in mean square, `G = Σ ggᵀ` over rows: the output factor of K-FAC's
approximation to the Gauss-Newton matrix of ½‖outputs‖². In this metric neurons are
chosen: by what the outputs lose with them and not by what the next layer does.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture import examples
from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.moments import MAX_DENSE
from dsbp_jax.layers import Interpreter, Site, array_leaves, bind, plan_of

_TOGETHER = 8  # examples whose derivatives are held at once
_SIGNS, _MOST = 2, 256  # random signs of each example; examples with them, in all
_DENSE = 256  # widest answers whose G is formed
_COLUMNS = 64  # of the sketch of a wider one
_REST = 1e-3  # share of a layer's mean that is added to each direction


def sensitivity(
    trace_of: Callable[[Any], AxisTrace],
    names: Sequence[str],
    params: Any,
    batch: Any,
) -> dict[str, np.ndarray]:
    """What the outputs feel of some layers' answers.

    Args:
      trace_of: Traces the function on a batch.
      names: Those of the layers.
      params: The parameters.
      batch: Arrays whose leading axis is the batch; some of its examples are taken.

    Returns:
      By layer R with `RRᵀ = G`, or in the mean so, shape `(*batch, d_out, r)`, for
      those that a derivative of the outputs reaches; empty where the function has none.
    """
    together = examples.at_once(trace_of, batch, _TOGETHER)
    structure = trace_of(examples.some(batch, 0, together))
    sites = {site.name: site for site in structure.traced.sites}
    layers = [
        sites[name]
        for name in dict.fromkeys(names)
        if name in sites and _has_metric(sites[name])  # fewer examples, fewer sites
    ]
    if not layers:
        return {}
    starts = [*range(0, examples.count(batch) - together + 1, together)] * _SIGNS
    arrays = lambda start: array_leaves((params, examples.some(batch, start, together)))
    try:
        program = _program(structure, layers).lower(arrays(0), np.int32(0)).compile()
    except (TypeError, ValueError, NotImplementedError):  # a loop without a reverse
        return {}
    total: dict[str, Any] = {site.name: 0.0 for site in layers}
    for number, start in enumerate(starts[: -(-_MOST // together)]):
        found = program(arrays(start), np.int32(number))
        total = {name: total[name] + np.asarray(one) for name, one in found.items()}
    if not all(np.isfinite(one).all() for one in total.values()):
        return {}
    means = {name: _traces(one).mean() / one.shape[-2] for name, one in total.items()}
    if not any(means.values()):
        return {}
    # Directions that these examples do not feel, others may.
    some = float(np.mean(list(means.values())))
    return {
        name: _root(one, _REST * float(means[name] or some))
        for name, one in total.items()
    }


def _is_gram(found: np.ndarray) -> bool:
    return found.shape[-1] == found.shape[-2]


def _traces(found: np.ndarray) -> np.ndarray:
    """Those of G, by matrix."""
    if _is_gram(found):
        return np.trace(found, axis1=-2, axis2=-1)
    return np.sum(found**2, axis=(-2, -1))


def _root(found: np.ndarray, rest: float) -> np.ndarray:
    """R of a `G` that was formed, or of a sketch, which is one; both plus `rest·I`."""
    if not _is_gram(found):
        signs = np.random.default_rng(0).choice([-1.0, 1.0], found.shape[-2:])
        return found + np.sqrt(rest / found.shape[-1]) * signs
    values, vectors = np.linalg.eigh(found.astype(np.float64))
    return vectors * np.sqrt(np.maximum(values, 0) + rest)[..., None, :]


def _has_metric(site: Site) -> bool:
    """Whether what the outputs feel of a layer can be said.

    Of a kernel that a loop shares G is formed, not sketched: there is one sign for a
    row of all iterations, which would mix them.
    """
    *_, width = site.view.matrix_shape(site.shape)
    formed = site.repeats == 1 or width <= MAX_DENSE
    return formed and site.rule is None and site.carries_gradient


def _columns(site: Site) -> int:
    """Of what is summed up for a layer: all of G, or a sketch of its root."""
    *_, width = site.view.matrix_shape(site.shape)
    return width if width <= _DENSE or site.repeats > 1 else _COLUMNS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(site: Site, y: jax.Array, felt: jax.Array, seed: jax.Array) -> jax.Array:
    """A response as it is; the cotangent of `felt` is made of the response's."""
    del site, felt, seed
    return y


_probe.defvjp(
    lambda site, y, felt, seed: (y, seed),
    lambda site, seed, cotangent: (cotangent, _of_rows(site, cotangent, seed), None),
)


def _of_rows(site: Site, cotangent: jax.Array, seed: jax.Array) -> jax.Array:
    """`ggᵀ` summed over rows, shape `(*batch, d_out, d_out)`; or a sketch of its root.

    Columns of the sketch are sums of g with random signs.
    """
    rows = site.outputs.to_rows(cotangent.astype(jnp.float32))
    columns = _columns(site)
    if columns == rows.shape[-1]:
        other = rows
    else:
        shape = rows.shape[-2], columns
        signs = jax.random.rademacher(jax.random.key(seed), shape, jnp.float32)
        other = jnp.broadcast_to(signs / columns**0.5, (*rows.shape[:-1], columns))
    return jnp.einsum("...na,...nb->...ab", rows, other, precision="highest")


class _Probing(Interpreter):
    """Runs the function as it is, with a probe at each answer."""

    def __init__(self, seed: jax.Array):
        super().__init__(lambda product, x, w, extra: (product(x, w), None))
        self._seed = seed

    def product(
        self, equation: Any, sites: Any, values: Sequence[Any], extras: Any
    ) -> Any:
        (result,) = bind(equation, values)
        for site in sites:
            result = _probe(site, result, extras[site.name], self._seed)
        return [result], {}


def _program(structure: AxisTrace, layers: Sequence[Site]) -> Any:
    """From array leaves and a seed to what is felt, compiled when it is called."""
    start = {}
    for site in layers:
        *_, width = site.view.matrix_shape(site.shape)
        shape = *site.batch_shape, width, _columns(site)
        start[site.name] = jnp.zeros(shape, jnp.float32)

    def answered(
        felt: Mapping[str, jax.Array], arrays: Sequence[Any], seed: jax.Array
    ) -> jax.Array:
        local = {site.name: site.scatter(felt[site.name]) for site in layers}
        body, plan = structure.traced.body, plan_of(layers)
        outputs, _ = _Probing(seed).run(body, arrays, plan, local, 0)
        outputs = [one for one in outputs if jnp.issubdtype(one.dtype, jnp.floating)]
        keys = jax.random.split(jax.random.key(seed), max(len(outputs), 1))
        signed = jnp.zeros((), jnp.float32)
        for key, output in zip(keys, outputs, strict=False):
            signs = jax.random.rademacher(key, output.shape, jnp.float32)
            signed += jnp.sum(signs * output.astype(jnp.float32))
        return signed

    return jax.jit(lambda arrays, seed: jax.grad(answered)(start, arrays, seed))
