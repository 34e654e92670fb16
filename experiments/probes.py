"""Spectra of a network in training, measured alike for every optimizer.

On a fixed batch of training images: per layer the leading eigenvalues of the
covariance `C = YᵀY/n` of its linear response Y, the share of the trace that they
hold, and how far their eigenspace has turned since the last measurement; for the
whole network the top eigenvalue of the loss's Hessian. Nothing here feeds back
into training.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsbp_jax
from dsbp_jax import linalg
from experiments import data
from experiments.config import Config
from experiments.steps import Classifier, TrainState

MAX_ROWS = 8192  # of a layer's response; a convolution has many more
Vectors = dict[str, jax.Array]


class Probe:
    """The measurements of one experiment, compiled once.

    Args:
      classifier: The model.
      config: The experiment: the rank is its optimizer's.
      split: Where the fixed batch comes from, the training set.
    """

    def __init__(self, classifier: Classifier, config: Config, split: data.Split):
        self.classifier = classifier
        self.rank = config.optimizer.rank
        self._order = list(classifier.layout())  # that of the model; jit sorts
        self.hessian_steps = config.probe.hessian_steps
        size = min(config.probe.batch_size, len(split))
        chosen = np.random.default_rng(0).choice(len(split), size, replace=False)
        self._batch = split.take(np.sort(chosen))
        self._measure = jax.jit(self._measure)

    def init(self, state: TrainState) -> Vectors:
        """What stands for the eigenvectors before the first measurement: zeros."""
        shapes = jax.eval_shape(
            self._bases, state.params, state.rest, self._batch.images
        )
        return {p: jnp.zeros(b.vectors.shape) for p, b in shapes.items()}

    def __call__(
        self, state: TrainState, previous: Vectors
    ) -> tuple[dict[str, Any], Vectors]:
        """Measures a state.

        Args:
          state: The state of training.
          previous: The eigenvectors of the last measurement, or `init`'s zeros.

        Returns:
          A record that JSON can hold, and the eigenvectors for the next time. In
          the record `layers` has for each kernel its `values` (descending),
          `captured` (their share of the trace), `drift` (the share of what they
          capture that the last eigenspace would have missed, 0 to 1; null the
          first time) and `angle` (between the leading eigenvectors, in degrees);
          `hessian` is the top eigenvalue.
        """
        measured, vectors = self._measure(
            state.params, state.rest, self._batch.images, self._batch.labels, previous
        )
        measured = jax.tree.map(_to_json, jax.device_get(measured))
        layers = measured["layers"]
        measured["layers"] = {path: layers[path] for path in self._order}
        first = not any(np.any(old) for old in jax.device_get(previous).values())
        if first:
            for layer in measured["layers"].values():
                layer |= {"drift": None, "angle": None}
        return measured, vectors

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

    def _measure(
        self,
        params: Any,
        rest: Any,
        images: jax.Array,
        labels: jax.Array,
        previous: Vectors,
    ) -> tuple[dict[str, Any], Vectors]:
        bases = self._bases(params, rest, images)
        layers = {p: _describe(basis, previous[p]) for p, basis in bases.items()}
        measured: dict[str, Any] = {"layers": layers}
        if self.hessian_steps:
            loss = lambda *args: self.classifier.loss(*args, mode="eval")[0]
            operator = linalg.hessian(loss, params, rest, images, labels)
            start = jax.random.normal(jax.random.key(0), (operator.dim,))
            steps = min(self.hessian_steps, operator.dim)
            krylov = linalg.lanczos(operator, start, steps)
            measured["hessian"] = jnp.linalg.eigvalsh(krylov.tridiagonal())[-1]
        return measured, {path: basis.vectors for path, basis in bases.items()}


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
