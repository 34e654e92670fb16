import jax
import jax.numpy as jnp
import numpy as np

import dsbp_jax
from dsbp_jax import Layout, MatrixView
from tests.layers.models import normal


def test_solved_spaces_say_whose_they_are():
    forward = dsbp_jax.capture_activations(lambda p, x: jnp.tanh(x @ p["w"].T) @ p["v"])
    params, x = {"w": normal(5, 5), "v": normal(5, 3, seed=1)}, normal(40, 5, seed=2)
    _, activations = forward(params, x)
    space = dsbp_jax.activation_bases(activations, rank=2)["w"]
    assert (space.side, space.source) == ("input", "activation")
    assert space.view == MatrixView((1,), (0,))
    assert space.solved
    # So the transfer terms take the axis that the model contracts, square or not.
    tx = dsbp_jax.project_away({"w": space})
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    v = space.vectors
    np.testing.assert_allclose(
        updates["w"], params["w"] - params["w"] @ v @ v.T, atol=1e-5
    )


def test_a_leaf_with_a_mark_of_further_uses_in_its_name():
    forward = dsbp_jax.capture_activations(lambda p, x: x @ p["a#b"])
    _, activations = forward({"a#b": normal(5, 4)}, normal(20, 5))
    assert set(dsbp_jax.activation_bases(activations, rank=2)) == {"a#b"}


def test_members_of_an_ensemble_captured_under_vmap():
    member = dsbp_jax.capture_activations(lambda p, x: x @ p["w"])
    stack, x = {"w": normal(3, 6, 4)}, normal(20, 6)
    _, activations = jax.vmap(member, in_axes=(0, None))(stack, x)
    spaces = dsbp_jax.activation_bases(activations, rank=2)
    own = Layout((("w", MatrixView((1,), (2,), (0,))),))
    tx = dsbp_jax.project_away(spaces, layout=own)
    updates, _ = jax.jit(tx.update)(stack, tx.init(stack))
    v = spaces["w"].vectors[1]
    expected = stack["w"][1] - v @ (v.T @ stack["w"][1])
    np.testing.assert_allclose(updates["w"][1], expected, atol=1e-5)
