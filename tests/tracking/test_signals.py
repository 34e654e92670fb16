import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import LayerActivations, MatrixView
from dsbp_jax.tracking.signals import (
    activation_signal,
    gradient_signal,
    present,
    rotation_signal,
)
from tests.layers.models import normal

VIEW = MatrixView((2,), (3,))


def covariance(signal):
    operator = signal.operator(*signal.arrays, signal.count)
    return operator.matmat(jnp.eye(operator.dim)), operator.trace


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_gradient_is_summed_over_window_taps(side):
    g = normal(3, 3, 6, 8)
    c, trace = covariance(gradient_signal(VIEW, g, side))
    spec = "abic,abjc->ij" if side == "input" else "abci,abcj->ij"
    np.testing.assert_allclose(c, jnp.einsum(spec, g, g), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trace, jnp.sum(g**2), rtol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_rotation_is_followed_by_its_square(side):
    view, g, w = MatrixView((0,), (1,)), normal(6, 5), normal(6, 5, seed=1)
    c, _ = covariance(rotation_signal(view, g, w, side))
    product = g @ w.T if side == "input" else g.T @ w
    a = (product - product.T) / 2
    np.testing.assert_allclose(c, a.T @ a, rtol=1e-4, atol=1e-3)


def test_only_uses_of_one_orientation_are_pooled():
    """Both uses of a square tied kernel have rows of one width, of other spaces."""
    there, back = MatrixView((0,), (1,)), MatrixView((1,), (0,))
    rows = [normal(7, 5, seed=i) for i in range(3)]
    use = lambda x, view: LayerActivations(x, x, jnp.int32(7), view)
    activations = {
        "w": use(rows[0], there),
        "w#1": use(rows[1], back),
        "w#2": use(rows[2], there),
    }
    c, _ = covariance(activation_signal(activations, (5,), "input", "w"))
    both = jnp.concatenate([rows[0], rows[2]])
    np.testing.assert_allclose(c, both.T @ both / 14, rtol=1e-4, atol=1e-5)


def test_a_signal_of_zeros_is_none():
    view, g = MatrixView((1,), (2,), (0,)), normal(3, 6, 5).at[1].set(0)
    signal = gradient_signal(view, g, "output")
    np.testing.assert_array_equal(present(signal.arrays), [True, False, True])
    nan = gradient_signal(view, g.at[1, 0, 0].set(jnp.nan), "output")
    np.testing.assert_array_equal(present(nan.arrays), [True, True, True])
    none = rotation_signal(view, normal(3, 6, 5, seed=1), jnp.zeros((3, 6, 5)), "input")
    assert not present(none.arrays).any()
