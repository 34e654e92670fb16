"""The map between spike-plus-flat models against the dense one, and mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.linalg import EigenBasis, Spiked, absorb, tail, transport

DIM, RANK = 12, 3


def model(seed, flat=0.5, rank=RANK):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(DIM, rank)))[0]
    values = np.sort(rng.uniform(2, 9, rank))[::-1]
    trace = values.sum() + flat * (DIM - rank)
    arrays = (jnp.asarray(a, jnp.float32) for a in (vectors, values, trace))
    mean = jnp.asarray(rng.normal(size=DIM), jnp.float32)
    return Spiked(mean, EigenBasis(*arrays))


def dense(one):
    v, flat = np.asarray(one.basis.vectors, np.float64), float(tail(one.basis))
    over = np.asarray(one.basis.values, np.float64) - flat
    return (v * over) @ v.T + flat * np.eye(DIM)


def root(c, power):
    values, vectors = np.linalg.eigh(c)
    return (vectors * values**power) @ vectors.T


def matrix(one):
    rows = one(jnp.eye(DIM) + one.target) - one.source
    return np.asarray(rows)


absorbed = jax.jit(absorb)


@pytest.mark.parametrize("rank", [RANK, 8])  # two thin bases, and the whole space
def test_the_map_is_the_optimal_one_between_gaussians(rank):
    source, target = model(0, 0.5, rank), model(1, 0.8, rank)
    a = matrix(transport(source, target))
    half = root(dense(source), 0.5)
    wanted = half @ root(half @ dense(target) @ half, -0.5) @ half
    np.testing.assert_allclose(a, wanted, atol=2e-5)
    np.testing.assert_allclose(a, a.T, atol=1e-6)
    np.testing.assert_allclose(a @ dense(target) @ a, dense(source), atol=1e-4)


def test_between_equal_models_nothing_moves():
    source = model(0)
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(5, DIM)), jnp.float32)
    moved = transport(source, source)(rows)
    np.testing.assert_allclose(moved, rows, rtol=1e-5, atol=1e-5)


def test_no_direction_is_stretched_by_more_than_the_limit():
    source = model(0)
    collapsed = Spiked(source.mean, jax.tree.map(lambda x: x, source.basis))
    thin = collapsed._replace(
        basis=EigenBasis(source.basis.vectors, jnp.zeros(RANK), jnp.zeros(()))
    )
    stretched = np.linalg.eigvalsh(matrix(transport(source, thin, 4.0)))
    np.testing.assert_allclose(stretched, 4.0, atol=1e-4)
    shrunk = np.linalg.eigvalsh(matrix(transport(thin, source, 4.0)))
    np.testing.assert_allclose(shrunk, 0.25, atol=1e-4)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_mixture_has_its_mean_and_covariance(weight):
    # With as many directions as dimensions nothing is flat, and all of it is exact.
    start = model(3, 0.0, DIM)
    rows = np.random.default_rng(4).normal(size=(40, DIM)) + 1
    mixed = absorbed(start, jnp.asarray(rows, jnp.float32), jnp.float32(weight))
    mean = (1 - weight) * np.asarray(start.mean) + weight * rows.mean(axis=0)
    second = weight * rows.T @ rows / 40
    second += (1 - weight) * (dense(start) + np.outer(start.mean, start.mean))
    np.testing.assert_allclose(mixed.mean, mean, atol=1e-5)
    np.testing.assert_allclose(dense(mixed), second - np.outer(mean, mean), atol=1e-4)


def test_a_thin_model_follows_the_leading_directions_and_the_trace():
    start, truth = model(5), model(6, 0.1)
    rng = np.random.default_rng(7)
    half = root(dense(truth), 0.5)
    follow = start
    for _ in range(6):
        rows = rng.normal(size=(400, DIM)) @ half + np.asarray(truth.mean)
        follow = absorbed(follow, jnp.asarray(rows, jnp.float32), jnp.float32(0.6))
    assert float(tail(follow.basis)) == pytest.approx(0.1, rel=0.2)
    overlap = np.asarray(truth.basis.vectors).T @ np.asarray(follow.basis.vectors)
    assert np.sum(overlap**2) > RANK - 0.05
    assert float(follow.basis.trace) == pytest.approx(np.trace(dense(truth)), rel=0.15)


def test_rows_that_are_not_finite_leave_the_model():
    start = model(8)
    rows = jnp.ones((40, DIM)).at[3, 2].set(jnp.nan)
    after = absorbed(start, rows, jnp.float32(0.5))
    jax.tree.map(np.testing.assert_array_equal, after, start)
