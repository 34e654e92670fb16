"""`jax_debug_nans` stays quiet on finite input: NaN is no sentinel here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from tests.layers.models import normal


@pytest.fixture(autouse=True)
def _debug_nans():
    with jax.debug_nans(True):
        yield


def test_blocks_that_are_rank_deficient():
    block = normal(12, 1) @ normal(1, 4, seed=1)
    columns = linalg.extend_basis(jnp.eye(12, 2), block)
    np.testing.assert_allclose(columns.T @ columns, jnp.eye(4), atol=1e-5)


def test_a_refresh_of_an_operator_of_rank_one():
    x = normal(20, 1) @ normal(1, 12, seed=1)
    basis = linalg.init_basis(12, 3, key=jax.random.key(0))
    basis = linalg.refresh_basis(linalg.gram(x), basis)
    np.testing.assert_allclose(basis.values[1:], 0, atol=1e-4)


def test_the_hessian_of_a_loss():
    loss = lambda w: jnp.sum(jnp.arange(1.0, 9.0) * w**2)
    operator = linalg.hessian(loss, jnp.ones(8))
    basis = linalg.init_basis(8, 1, key=jax.random.key(0))
    basis = linalg.refresh_basis(operator, basis, num_blocks=8)
    np.testing.assert_allclose(basis.values, [16.0], rtol=1e-4)
    assert np.isfinite(basis.trace)


def test_zeros_everywhere():
    basis = linalg.init_basis(12, 3, key=jax.random.key(0))
    basis = linalg.refresh_basis(linalg.gram(jnp.zeros((5, 12))), basis)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in basis)
