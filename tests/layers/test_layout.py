"""What a layout accepts, and the paths that it is by."""

import re
from typing import NamedTuple

import jax
import pytest
from flax import nnx

from dsbp_jax import Layout, MatrixView
from dsbp_jax.layers import layout, leaves_by_path, map_paths
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
