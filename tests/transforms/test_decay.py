import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView, linalg
from dsbp_jax.tracking import Eigenspace
from tests.layers.models import normal

PARAMS = {"w": normal(6, 6)}
ZEROS = {"w": jnp.zeros((6, 6))}


def space(view, side):
    vectors = jnp.linalg.qr(normal(6, 2, seed=1))[0]
    basis = linalg.EigenBasis(vectors, jnp.array([3.0, 1.0]), jnp.float32(5))
    return Eigenspace(basis, jnp.array(True), view, side, "activation")


def term(matrix, one, rank):
    """`Σ λᵢ eᵢeᵢᵀ W` or `Σ λᵢ W eᵢeᵢᵀ`, by whole matrices."""
    v, values = one.vectors[:, :rank], one.values[:rank]
    middle = v @ jnp.diag(values) @ v.T
    return middle @ matrix if one.side == "input" else matrix @ middle


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("rank", [1, 2])
def test_given_spaces_decay_along_the_axis_that_they_name(side, rank):
    for view in (MatrixView((0,), (1,)), MatrixView((1,), (0,))):
        one = space(view, side)
        tx = dsbp_jax.add_spectral_decay(0.1, bases={"w": one}, rank=rank)
        updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
        turned = view == MatrixView((1,), (0,))
        matrix = PARAMS["w"].T if turned else PARAMS["w"]
        expected = 0.1 * term(matrix, one, rank)
        expected = expected.T if turned else expected
        np.testing.assert_allclose(updates["w"], expected, atol=1e-6)


def test_no_bases_in_an_update_leave_the_fixed_ones_on():
    one = space(MatrixView((0,), (1,)), "output")
    tx = dsbp_jax.add_spectral_decay(0.1, bases={"w": one})
    expected, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS, bases=None)
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert jnp.abs(updates["w"]).max() > 1e-3
    # Those that come with the update go first.
    other = {"w": space(MatrixView((0,), (1,)), "input")}
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS, bases=other)
    expected = 0.1 * term(PARAMS["w"], other["w"], 1)
    np.testing.assert_allclose(updates["w"], expected, atol=1e-6)


def test_spaces_of_another_transform_need_no_layout_again():
    layout = Layout((("w", MatrixView((1,), (0,))),))
    tracking = dsbp_jax.track_bases(2, layout=layout)
    _, state = tracking.update(PARAMS, tracking.init(PARAMS), PARAMS)
    spaces = dsbp_jax.eigenspaces(state)
    tx = dsbp_jax.add_spectral_decay(0.1, bases=spaces)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    (one,) = spaces["w"]
    expected = 0.1 * term(PARAMS["w"].T, one, 1).T
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)
