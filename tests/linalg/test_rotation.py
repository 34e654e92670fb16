"""Low-rank rotations against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from tests.layers.models import normal


def problem(d, m, scale=1.0):
    u = jnp.linalg.qr(normal(d, m))[0]
    j = scale * normal(m, m, seed=1)
    return u, 0.5 * (j - j.T)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_against_dense_expm(scale):
    u, j = problem(40, 6, scale)
    w = normal(40, 5, seed=2)
    dense = jax.scipy.linalg.expm(u @ j @ u.T)
    np.testing.assert_allclose(
        linalg.expm_lowrank_skew(u, j)(w), dense @ w, atol=1e-5 * max(1, scale)
    )


def test_against_dense_cayley():
    u, j = problem(40, 6)
    a = u @ j @ u.T
    identity = jnp.eye(40)
    dense = jnp.linalg.solve(identity - a / 2, identity + a / 2)
    w = normal(40, 5, seed=2)
    np.testing.assert_allclose(
        linalg.cayley_lowrank_skew(u, j)(w), dense @ w, atol=1e-5
    )


@pytest.mark.parametrize(
    "rotate", [linalg.expm_lowrank_skew, linalg.cayley_lowrank_skew]
)
def test_orthogonal_batched_and_of_the_same_dtype(rotate):
    u, j = problem(30, 4, 3.0)
    q = rotate(u, j)(jnp.eye(30))
    np.testing.assert_allclose(q.T @ q, np.eye(30), atol=2e-6)
    assert np.linalg.det(q) == pytest.approx(1, abs=1e-5)
    stack = lambda x, y: jnp.stack([x, y])
    w = normal(2, 30, 3)
    together = rotate(stack(u, u), stack(j, -j))(w)
    np.testing.assert_allclose(together[0], rotate(u, j)(w[0]), atol=1e-5)
    np.testing.assert_allclose(together[1], rotate(u, -j)(w[1]), atol=1e-5)
    assert rotate(u, j)(w[0].astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_bad_shapes():
    u, j = problem(10, 3)
    with pytest.raises(ValueError, match=r"u must have .*, got \(10, 3\)"):
        linalg.expm_lowrank_skew(u, jnp.eye(4))
    with pytest.raises(ValueError, match=r"w must have shape .*got \(9, 2\)"):
        linalg.expm_lowrank_skew(u, j)(jnp.ones((9, 2)))
