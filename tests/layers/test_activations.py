"""Rows that a layer saw: how many count, and the view that travels with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import LayerActivations, MatrixView
from dsbp_jax.layers import capture_activations, layout
from tests.layers.models import normal

VIEW = MatrixView((0,), (1,))
OTHER = MatrixView((1,), (0,))


def test_the_share_of_rows_that_count_is_the_same_on_both_sides():
    """A convolution of stride 2: eight inputs for four responses, two of them valid."""
    layer = LayerActivations(
        normal(3, 8, 4), normal(3, 4, 5), jnp.full(3, 2, jnp.int32)
    )
    rows, count = layer.rows("output")
    np.testing.assert_array_equal(rows, layer.outputs)
    np.testing.assert_array_equal(count, [2.0, 2.0, 2.0])
    rows, count = layer.rows("input")
    np.testing.assert_array_equal(rows, layer.inputs)
    np.testing.assert_array_equal(count, [4.0, 4.0, 4.0])
    assert count.dtype == jnp.float32


def test_inputs_alone_are_counted_themselves():
    layer = LayerActivations(normal(8, 4), None, jnp.int32(6))
    assert layer.rows("input")[1] == 6
    with pytest.raises(ValueError, match="activations hold no outputs; capture them"):
        layer.rows("output")


# The view


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"].T


def test_captured_activations_know_the_view_of_their_use():
    params, x = {"w": normal(4, 4)}, normal(5, 4)
    captured = jax.jit(capture_activations(tied))
    _, found = captured(params, x)
    assert found["w"].view == VIEW
    assert found["w#1"].view == OTHER
    assert {name: layer.view for name, layer in found.items()} == dict(
        layout(tied, params, x)
    )


def test_a_view_is_static_to_every_transformation():
    params, x = {"w": normal(4, 3)}, normal(5, 4)
    captured = capture_activations(lambda p, x: x @ p["w"])
    layer = captured(params, x)[1]["w"]
    assert len(jax.tree.leaves(layer)) == 3
    doubled = jax.jit(lambda layer: jax.tree.map(lambda a: 2 * a, layer))(layer)
    assert doubled.view == VIEW
    _, batched = jax.vmap(captured, (None, 0))(params, normal(2, 5, 4))
    assert batched["w"].view == VIEW
    assert batched["w"].inputs.shape == (2, 5, 4)

    def loss(inputs):
        return jnp.sum(layer._replace(inputs=inputs).rows("input")[0] ** 2)

    np.testing.assert_allclose(jax.grad(loss)(x), 2 * x)
    gradient = jax.grad(lambda layer: jnp.sum(layer.inputs), allow_int=True)(layer)
    assert gradient.view == VIEW


def test_activations_without_a_view():
    layer = LayerActivations(normal(5, 4), None, jnp.int32(5))
    assert layer.view is None
    assert jax.tree.map(lambda a: a, layer).view is None
    assert layer._replace(view=OTHER).view == OTHER
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(layer)]
    assert names == [".inputs", ".count"]
