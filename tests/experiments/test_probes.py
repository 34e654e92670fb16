"""Spectral probes against dense linear algebra."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import data, probes
from experiments.config import ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender
from experiments.study import loop
from experiments.tasks.images import ImageTask


@pytest.fixture(scope="module")
def probed():
    """A task, its state, its probe, and another state."""
    config = ImageConfig(
        model=ModelConfig("mlp", {"hidden": (6,)}),
        optimizer=Contender.parse("sgd:learning_rate=0.1"),
        probe=ProbeConfig(batch_size=40, rank=4, hessian_steps=100),
        batch_size=256,
        epochs=2,
    )
    task = ImageTask(config)
    state = loop.train(task, config, task.init(config), first=0, until=4).state
    return task, state, task.probe, task.init(dataclasses.replace(config, seed=1))


def measure(probe, state, seen=None):
    """What a probe says of a state."""
    seen = probe.init(state.params, state.rest) if seen is None else seen
    return probe(state.params, state.rest, seen)


def responses(task, state, images):
    """The linear responses of both layers, without biases."""
    x = data.normalize(images, task.classifier.dataset).reshape(len(images), -1)
    first = x @ state.params["layers"][0]["kernel"]
    hidden = jax.nn.relu(first + state.params["layers"][0]["bias"])
    return {
        "layers/0/kernel": first,
        "head/kernel": hidden @ state.params["head"]["kernel"],
    }


def test_spectra_are_those_of_the_dense_covariances(probed):
    task, state, probe, _ = probed
    record, seen = measure(probe, state)
    expected = responses(task, state, probe._batch.images)
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


def dense_hessian(task, state, probe):
    """The Hessian of the loss on the probe's batch."""
    flat, unravel = ravel_pytree(state.params)
    batch = probe._batch
    loss = lambda w: task.classifier.loss(
        unravel(w), state.rest, batch.images, batch.labels, mode="eval"
    )[0]
    return np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)


def test_the_hessian_is_that_of_the_loss(probed, monkeypatch):
    task, state, probe, _ = probed
    monkeypatch.setattr(probes, "TOLERANCE", 1e-6)
    record, _ = measure(probe, state)
    top = np.linalg.eigvalsh(dense_hessian(task, state, probe))[-1]
    assert record["hessian"] == pytest.approx(float(top), rel=1e-3)


def test_the_trace_is_within_what_random_signs_vary(probed):
    task, state, probe, _ = probed
    h = dense_hessian(task, state, probe)
    # The variance of sᵀHs is twice the sum of squares off the diagonal.
    variance = 2 * (np.sum(h**2) - np.sum(np.diag(h) ** 2))
    error = np.sqrt(variance / probes.SIGNS)
    found = probe.hessian_trace(state.params, state.rest)
    assert found == pytest.approx(np.trace(h), abs=3 * error)
    assert error < 0.25 * np.trace(h)


def test_no_trace_where_the_loss_is_not_finite(probed):
    _, state, probe, _ = probed
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
    assert probe.hessian_trace(broken, state.rest) is None


def test_drift_is_unknown_then_zero_then_positive(probed):
    _, state, probe, other = probed
    first, seen = measure(probe, state)
    for layer in first["layers"].values():
        assert layer["drift"] is None
        assert layer["angle"] is None
    same, seen = measure(probe, state, seen)
    for layer in same["layers"].values():
        assert layer["drift"] == pytest.approx(0, abs=1e-5)
        assert layer["angle"] == pytest.approx(0, abs=0.1)
    moved, _ = measure(probe, other, seen)
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
    _, state, probe, other = probed
    before = jax.tree.map(np.array, state.params)
    _, seen = measure(probe, state)
    measure(probe, other, seen)
    assert probe._measure._cache_size() <= 2  # zeros may live elsewhere than results
    jax.tree.map(np.testing.assert_array_equal, before, state.params)
