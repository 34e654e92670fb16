"""What a layout accepts, and what activations know of their use."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsbp_jax
from dsbp_jax import LayerActivations, Layout, MatrixView
from dsbp_jax.layers import capture_activations, layout, leaves_by_path, map_paths
from tests.layers.models import normal

VIEW = MatrixView((0,), (1,))
OTHER = MatrixView((1,), (0,))


@pytest.mark.parametrize(
    "views",
    [
        {"a": VIEW, "b": OTHER},
        [("a", VIEW), ("b", OTHER)],
        [["a", VIEW], ["b", OTHER]],
        iter((("a", VIEW), ("b", OTHER))),
        Layout({"a": VIEW, "b": OTHER}),
    ],
    ids=["dict", "list", "lists", "iterator", "layout"],
)
def test_a_layout_is_made_of_any_mapping_or_pairs(views):
    made = Layout(views)
    assert made == Layout((("a", VIEW), ("b", OTHER)))
    assert made.views == (("a", VIEW), ("b", OTHER))
    assert len({made, Layout((("a", VIEW), ("b", OTHER)))}) == 1
    assert dict(made) == {"a": VIEW, "b": OTHER}
    run = jax.jit(lambda x, layout: x * len(layout), static_argnums=1)
    assert run(1.0, made) == 2.0


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([("a", VIEW), ("a", OTHER)], "views must name each path once, got 'a' twice"),
        ({("a",): VIEW}, "got MatrixView(input_axes=(0,), output_axes=(1,), batch"),
        ({"a": ((0,), (1,))}, "got ((0,), (1,)) for 'a'"),
        ({"a": None}, "views must be a mapping or pairs of a path and a MatrixView"),
        ([VIEW], "views must be a mapping or pairs of a path and a MatrixView, got"),
        (["ab"], "got 'b' for 'a'"),
        ([("a", VIEW, 1)], "among them"),
        (3, "views must be a mapping or pairs of a path and a MatrixView, got 3"),
    ],
)
def test_what_is_no_layout(views, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Layout(views)
    assert str(error.value).startswith("views must ")


# Activations that know their view


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


# Paths of the user's own


class Scaled(NamedTuple):
    value: jax.Array


class Pair(NamedTuple):
    value: jax.Array
    gain: jax.Array


def test_a_field_called_value_keeps_its_name():
    params = {"a": Scaled(normal(4, 3)), "b": Pair(normal(3, 2), normal(2))}
    assert list(leaves_by_path(params)) == ["a/value", "b/value", "b/gain"]
    named = map_paths(lambda path, leaf: path, params)
    assert named == {"a": Scaled("a/value"), "b": Pair("b/value", "b/gain")}
    model = lambda p, x: x @ p["a"].value @ p["b"].value * p["b"].gain
    assert list(layout(model, params, normal(5, 4))) == ["a/value", "b/value"]
    # The path that it would have been shortened to is free for another leaf.
    assert list(leaves_by_path([Scaled(1.0), {"": 2.0}])) == ["0/value", "1/"]


def test_nnx_variables_agree_with_arrays_at_any_depth():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), Holder(nnx.Rngs(1)))
    state = nnx.state(model, nnx.Param)
    names = list(leaves_by_path(state))
    assert "layers/0/kernel" in names
    assert "layers/1/scaled/value" in names
    assert list(leaves_by_path(nnx.to_pure_dict(state))) == names
    mapped = map_paths(lambda path, leaf: path, state)
    assert jax.tree.leaves(mapped) == names
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


class Holder(nnx.Module):
    """A variable that holds the user's own class."""

    def __init__(self, rngs):
        self.scaled = nnx.Param(Scaled(rngs.normal((3, 2))))

    def __call__(self, x):
        return x @ self.scaled[...].value


# Marks of further uses


HASHES = {"a#b": normal(12, 16) / 4, "w#1": normal(16, 14, seed=1) / 4}


def hashed(params, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a#b"]) @ params["w#1"]) ** 2)


def test_a_path_may_hold_the_mark_of_further_uses():
    x = normal(64, 12, seed=2)
    assert list(layout(hashed, HASHES, x)) == ["a#b", "w#1"]
    _, found = capture_activations(hashed)(HASHES, x)
    assert {name: layer.inputs.shape for name, layer in found.items()} == {
        "a#b": (64, 12),
        "w#1": (64, 16),
    }
    report = dsbp_jax.explain(hashed, HASHES, x, rank=4)
    assert not any("further" in entry.reason for entry in report.values())
    backprop = dsbp_jax.spectral_backprop(hashed, 4, refresh_every=2)
    state = backprop.init(HASHES, x, key=jax.random.key(0))
    _, grads, state = jax.jit(backprop.value_and_grad)(HASHES, state, x)
    exact = jax.grad(hashed)(HASHES, x)
    bases = dsbp_jax.bases(state)
    assert set(bases) == set(HASHES)
    training = dsbp_jax.spectral_coordinates(hashed, 4)
    coords, frame = training.init(HASHES, x, key=jax.random.key(0))
    assert set(frame.kernels) == set(HASHES)
    for path, gradient in grads.items():
        assert np.linalg.norm(gradient) < np.linalg.norm(exact[path])
        assert coords[path].shape == (4, HASHES[path].shape[1])


def test_a_mark_that_a_further_use_needs_too():
    params = {"w": normal(4, 4), "w#1": normal(4, 4, seed=1)}
    twice = lambda p, x: x @ p["w"] @ p["w"] @ p["w#1"]
    with pytest.raises(ValueError, match=r"'w#1' is the path of a leaf and the name"):
        layout(twice, params, normal(5, 4))
    with pytest.raises(ValueError, match=r"'w#1' is the path of a leaf and the name"):
        dsbp_jax.explain(twice, params, normal(5, 4))
    once = lambda p, x: x @ p["w"] @ p["w#1"]
    assert list(layout(once, params, normal(5, 4))) == ["w", "w#1"]
