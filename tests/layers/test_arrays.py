"""Splitting a tree into what is traced and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.layers.arrays import array_leaves, is_array, split_arrays

TREE = {"a": jnp.ones(2), "b": ("name", np.zeros(3), None, 1.5), "c": jnp.tanh}


@pytest.mark.parametrize(
    "leaf",
    [
        np.zeros(2),
        np.float32(1),
        jnp.zeros(()),
        jax.random.key(0),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    ],
)
def test_what_has_shape_and_dtype_is_an_array(leaf):
    assert is_array(leaf)


@pytest.mark.parametrize("leaf", [1.0, True, "x", None, jnp.tanh, [1.0]])
def test_what_is_static(leaf):
    assert not is_array(leaf)


def test_rebuild_puts_others_in_the_place_of_arrays_only():
    arrays, rebuild = split_arrays(TREE)
    assert [leaf.shape for leaf in arrays] == [(2,), (3,)]
    assert all(a is b for a, b in zip(arrays, array_leaves(TREE), strict=True))
    again = rebuild(arrays)
    assert again["a"] is TREE["a"]
    assert again["b"][1] is TREE["b"][1]
    other = rebuild(iter(["first", "second"]))
    assert other == {"a": "first", "b": ("name", "second", None, 1.5), "c": jnp.tanh}


def test_rebuild_holds_on_to_no_array():
    """They may be tracers, which must not outlive the call."""
    _, rebuild = split_arrays(TREE)
    held = [cell.cell_contents for cell in rebuild.__closure__]
    assert not array_leaves(held)
