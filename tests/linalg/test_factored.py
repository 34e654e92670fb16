"""Products with a matrix in factors, against the matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from tests.layers.models import normal


@pytest.mark.parametrize("more", [0, 3])
def test_it_is_the_gram_matrix_of_the_product(more):
    a, b = normal(12, 5 + more), normal(5, 7, seed=1)
    operator = linalg.product_gram(a, b)
    g, m = a[:, :5] @ b, a[:, 5:]
    wanted, v = g @ g.T + m @ m.T, normal(12, 4, seed=2)
    scale = float(jnp.trace(wanted))
    np.testing.assert_allclose(operator.matmat(v), wanted @ v, atol=1e-6 * scale)
    half = operator.half(v)
    np.testing.assert_allclose(half.T @ half, v.T @ wanted @ v, atol=1e-5 * scale)
    np.testing.assert_allclose(operator.trace, scale, rtol=0.5)


def test_nothing_has_no_trace():
    operator = linalg.product_gram(normal(4, 3), jnp.zeros((3, 2)))
    assert operator.trace == 0


def test_factors_must_fit():
    with pytest.raises(ValueError, match="b must have at most 3 rows to fit a"):
        linalg.product_gram(normal(4, 3), normal(5, 2))
    with pytest.raises(ValueError, match="a must be a floating-point array"):
        linalg.product_gram(normal(4), normal(5, 2))
