"""Spectral probes against dense linear algebra."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import data, probes
from experiments.config import Config, ModelConfig, ProbeConfig
from experiments.loop import make_trainer, train_epoch
from experiments.optimizers import OptimizerConfig
from experiments.probes import Probe


@pytest.fixture(scope="module")
def probed():
    """A trainer, its state and its probe."""
    config = Config(
        model=ModelConfig("mlp", {"hidden": (6,)}),
        optimizer=OptimizerConfig("sgd", rank=4),
        probe=ProbeConfig(batch_size=40, hessian_steps=100),
        batch_size=256,
        epochs=2,
    )
    trainer = make_trainer(data.load("digits"), config)
    state = trainer.init(0)
    state, _ = train_epoch(trainer, state, seed=0, epoch=0, peak=0.1)
    return trainer, state, Probe(trainer.classifier, config, data.load("digits").train)


def responses(trainer, state, images):
    """The linear responses of both layers, without biases."""
    x = data.normalize(images, trainer.classifier.dataset).reshape(len(images), -1)
    first = x @ state.params["layers"][0]["kernel"]
    hidden = jax.nn.relu(first + state.params["layers"][0]["bias"])
    return {
        "layers/0/kernel": first,
        "head/kernel": hidden @ state.params["head"]["kernel"],
    }


def test_spectra_are_those_of_the_dense_covariances(probed):
    trainer, state, probe = probed
    record, seen = probe(state, probe.init(state))
    expected = responses(trainer, state, probe._batch.images)
    assert list(record["layers"]) == list(expected)
    for path, rows in expected.items():
        covariance = np.asarray(rows, np.float64).T @ rows / len(rows)
        values = np.linalg.eigvalsh(covariance)[::-1]
        layer = record["layers"][path]
        np.testing.assert_allclose(layer["values"], values[:4], rtol=1e-4)
        captured = values[:4].sum() / values.sum()
        assert layer["captured"] == pytest.approx(captured, rel=1e-4)
        v = np.asarray(seen.layers[path])
        np.testing.assert_allclose(v.T @ v, np.eye(4), atol=1e-5)


def test_the_hessian_is_that_of_the_loss(probed, monkeypatch):
    trainer, state, probe = probed
    monkeypatch.setattr(probes, "TOLERANCE", 1e-6)
    record, _ = probe(state, probe.init(state))
    flat, unravel = ravel_pytree(state.params)
    batch = probe._batch
    loss = lambda w: trainer.classifier.loss(
        unravel(w), state.rest, batch.images, batch.labels, mode="eval"
    )[0]
    top = np.linalg.eigvalsh(jax.jit(jax.hessian(loss))(flat))[-1]
    assert record["hessian"] == pytest.approx(float(top), rel=1e-3)


def test_drift_is_unknown_then_zero_then_positive(probed):
    trainer, state, probe = probed
    first, seen = probe(state, probe.init(state))
    for layer in first["layers"].values():
        assert layer["drift"] is None
        assert layer["angle"] is None
    same, seen = probe(state, seen)
    for layer in same["layers"].values():
        assert layer["drift"] == pytest.approx(0, abs=1e-5)
        assert layer["angle"] == pytest.approx(0, abs=0.1)
    moved, _ = probe(trainer.init(1), seen)
    assert moved["layers"]["layers/0/kernel"]["drift"] > 0.01


def test_drift_of_a_rotated_basis():
    eye = jnp.eye(4)
    basis = probes.linalg.EigenBasis(eye[:, :2], jnp.array([3.0, 1.0]), jnp.array(5.0))
    described = probes._describe(basis, eye[:, :1:-1])
    assert float(described["drift"]) == pytest.approx(1)
    assert float(described["angle"]) == pytest.approx(90)
    assert float(described["captured"]) == pytest.approx(0.8)
    # The direction that was missed holds a quarter of the energy.
    described = probes._describe(basis, eye[:, jnp.array([0, 2])])
    assert float(described["drift"]) == pytest.approx(0.25)
    assert float(described["angle"]) == pytest.approx(0)


def test_stacked_layers_are_solved_one_by_one():
    rows = jax.random.normal(jax.random.key(0), (2, 30, 5))
    count = jnp.array([30.0, 30.0])
    stacked = jax.jit(partial(probes._covariance_basis, rank=3))(rows, count)
    assert stacked.vectors.shape == (2, 5, 3)
    for own, values in zip(np.asarray(rows), stacked.values, strict=True):
        expected = np.linalg.eigvalsh(own.T @ own / 30)[:1:-1]
        np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_a_probe_compiles_once_and_changes_nothing(probed):
    trainer, state, probe = probed
    before = jax.tree.map(np.array, state.params)
    _, seen = probe(state, probe.init(state))
    probe(trainer.init(2), seen)
    assert probe._measure._cache_size() <= 2  # zeros may live elsewhere than results
    jax.tree.map(np.testing.assert_array_equal, before, state.params)
