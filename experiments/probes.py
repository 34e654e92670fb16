"""Spectra of a network in training, measured alike for every optimizer.

On a fixed batch of training images: per layer the leading eigenvalues of the
covariance `C = YᵀY/n` of its linear response Y, the share of the trace that they
hold, and how far their eigenspace has turned since the last measurement; for the
whole network the top eigenvalue of the loss's Hessian, and at the end its trace.
Nothing here feeds back into training.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dsbp_jax
from dsbp_jax import linalg
from experiments import data
from experiments.config import ProbeConfig

MAX_ROWS = 8192  # of a layer's response; a convolution has many more
TOLERANCE = 0.01  # relative change of the top Hessian eigenvalue at which it is found
SIGNS = 16  # vectors of random signs that estimate the Hessian's trace


class Seen(NamedTuple):
    """What a measurement leaves for the next one.

    Attributes:
      layers: The eigenvectors of each layer, by path; zeros before the first.
      hessian: The top eigenpair of the Hessian, or None where it is not measured.
    """

    layers: dict[str, jax.Array]
    hessian: linalg.EigenBasis | None


class Probe:
    """The measurements of one experiment, compiled once.

    Args:
      classifier: The model, a `tasks.images.Classifier`.
      config: What is measured.
      split: Where the fixed batch comes from, the training set.
    """

    def __init__(self, classifier: Any, config: ProbeConfig, split: data.Split):
        self.classifier = classifier
        self.rank = config.rank
        self._order = list(classifier.uses().layout)  # that of the model; jit sorts
        self.hessian_steps = config.hessian_steps
        size = min(config.batch_size, len(split))
        chosen = np.random.default_rng(0).choice(len(split), size, replace=False)
        self._batch = split.take(np.sort(chosen))
        self._measure = jax.jit(self._measure_layers)
        self._refresh = jax.jit(self._refresh_hessian)
        self._along = jax.jit(self._curvature_along)

    def init(self, params: Any, rest: Any) -> Seen:
        """What stands for the last measurement before the first."""
        shapes = jax.eval_shape(self._bases, params, rest, self._batch.images)
        layers = {path: jnp.zeros(b.vectors.shape) for path, b in shapes.items()}
        if not self.hessian_steps:
            return Seen(layers, None)
        return Seen(layers, _random_start(params))

    def __call__(
        self, params: Any, rest: Any, seen: Seen
    ) -> tuple[dict[str, Any], Seen]:
        """Measures a network.

        Args:
          params: Its parameters.
          rest: The rest of its state.
          seen: What the last measurement left, or `init`.

        Returns:
          A record that JSON can hold, and what to give the next measurement. In
          the record `layers` has for each kernel its `values` (descending),
          `captured` (their share of the trace), `drift` (the share of what they
          capture that the last eigenspace would have missed, 0 to 1; null the
          first time) and `angle` (between the leading eigenvectors, in degrees);
          `hessian` is the top eigenvalue.
        """
        layers, vectors = self._measure(params, rest, self._batch.images, seen.layers)
        layers = jax.tree.map(_to_json, jax.device_get(layers))
        record: dict[str, Any] = {
            "layers": {path: layers[path] for path in self._order}
        }
        if not any(np.any(old) for old in jax.device_get(seen.layers).values()):
            for layer in layers.values():
                layer |= {"drift": None, "angle": None}
        hessian = seen.hessian
        if hessian is not None:
            hessian = self._follow_hessian(params, rest, hessian)
            record["hessian"] = _to_json(np.asarray(hessian.values[0]))
        return record, Seen(vectors, hessian)

    def top_hessian_eigenvalue(self, params: Any, rest: Any) -> float | None:
        """That of the training loss on the fixed batch, from a random start.

        None where it is not finite, or where nothing is to be measured.
        """
        if not (self.hessian_steps and len(self._batch)):
            return None
        start = _random_start(params)
        basis = self._follow_hessian(params, rest, start)
        # A refresh that was refused leaves the start as it was.
        moved = not np.array_equal(basis.vectors, start.vectors)
        return float(basis.values[0]) if moved else None

    def hessian_trace(self, params: Any, rest: Any) -> float | None:
        """That of the training loss on the fixed batch, estimated.

        The mean of `sᵀHs` over vectors s of random signs, the same at every call:
        unbiased over signs (Hutchinson, A stochastic estimator of the trace, 1989).

        None where it is not finite, or where nothing is to be measured.
        """
        if not len(self._batch):
            return None
        images, labels = self._batch.images, self._batch.labels
        # The loop is the host's, as below.
        keys = jax.random.split(jax.random.key(0), SIGNS)
        found = [self._along(params, rest, images, labels, key) for key in keys]
        trace = float(np.mean(jax.device_get(found)))
        return trace if np.isfinite(trace) else None

    def _follow_hessian(
        self, params: Any, rest: Any, hessian: linalg.EigenBasis
    ) -> linalg.EigenBasis:
        """The top eigenpair of the Hessian, from where it was last."""
        images, labels = self._batch.images, self._batch.labels
        # The loop is the host's: inside one of XLA's, convolutions on a CPU take over
        # ten times as long.
        for _ in range(self.hessian_steps):
            before = hessian.values
            hessian = self._refresh(params, rest, images, labels, hessian)
            change = jnp.abs(hessian.values - before)
            if jnp.all(change <= TOLERANCE * jnp.abs(hessian.values)):
                break
        return hessian

    def _bases(
        self, params: Any, rest: Any, images: jax.Array
    ) -> dict[str, linalg.EigenBasis]:
        forward = lambda params: self.classifier.apply(
            params, rest, images, mode="eval"
        )
        capture = dsbp_jax.capture_activations(
            forward, max_rows=MAX_ROWS, which=("outputs",)
        )
        _, activations = capture(params)
        solve = partial(_covariance_basis, rank=self.rank)
        return {
            path: solve(*layer.rows("output")) for path, layer in activations.items()
        }

    def _measure_layers(
        self, params: Any, rest: Any, images: jax.Array, seen: dict[str, jax.Array]
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        bases = self._bases(params, rest, images)
        layers = {path: _describe(basis, seen[path]) for path, basis in bases.items()}
        return layers, {path: basis.vectors for path, basis in bases.items()}

    def _refresh_hessian(
        self,
        params: Any,
        rest: Any,
        images: jax.Array,
        labels: jax.Array,
        basis: linalg.EigenBasis,
    ) -> linalg.EigenBasis:
        operator = self._hessian(params, rest, images, labels)
        return linalg.refresh_basis(operator, basis)

    def _curvature_along(
        self,
        params: Any,
        rest: Any,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """`sᵀHs` for a vector s of random signs."""
        operator = self._hessian(params, rest, images, labels)
        signs = jax.random.rademacher(key, (operator.dim, 1), jnp.float32)
        return jnp.vdot(signs, operator.matmat(signs))

    def _hessian(
        self, params: Any, rest: Any, images: jax.Array, labels: jax.Array
    ) -> linalg.SymmetricOperator:
        loss = lambda *args: self.classifier.loss(*args, mode="eval")[0]
        return linalg.hessian(loss, params, rest, images, labels)


def _random_start(params: Any) -> linalg.EigenBasis:
    """Where the search for the Hessian's top eigenvector begins."""
    dim = sum(leaf.size for leaf in jax.tree.leaves(params))
    return linalg.init_basis(dim, 1, key=jax.random.key(0))


def _covariance_basis(
    rows: jax.Array, count: jax.Array, *, rank: int
) -> linalg.EigenBasis:
    """The leading eigenpairs of the covariance of rows `(*batch, n, d)`."""
    if rows.ndim > 2:
        return jax.vmap(partial(_covariance_basis, rank=rank))(rows, count)
    return linalg.top_eigenpairs(
        linalg.gram(rows, count=count),
        min(rank, rows.shape[-1]),
        key=jax.random.key(0),
        max_restarts=20,
    )


def _describe(basis: linalg.EigenBasis, previous: jax.Array) -> dict[str, jax.Array]:
    """Values, captured energy and drift of a basis; the mean over batch axes."""
    tiny = 1e-30
    values = jnp.maximum(basis.values, 0)
    overlap = jnp.einsum("...di,...dj->...ij", previous, basis.vectors)
    leading = jnp.clip(jnp.abs(overlap[..., 0, 0]), 0, 1)
    energy = values.sum(-1)
    # Squared sines of the principal angles, seen from the new eigenvectors and
    # weighted by their eigenvalues: those of the null space turn freely.
    missed = jnp.sum(values * (1 - jnp.sum(overlap**2, axis=-2)), axis=-1)
    return {
        "values": values.reshape(-1, values.shape[-1]).mean(0),
        "captured": jnp.clip(energy / jnp.maximum(basis.trace, tiny), 0, 1).mean(),
        "drift": jnp.clip(missed / jnp.maximum(energy, tiny), 0, 1).mean(),
        "angle": jnp.degrees(jnp.arccos(leading)).mean(),
    }


def _to_json(x: np.ndarray) -> Any:
    """Plain numbers, to the six digits that float32 has."""
    return [float(f"{v:.6g}") for v in x] if x.ndim else float(f"{x:.6g}")
