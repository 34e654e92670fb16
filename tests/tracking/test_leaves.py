import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView
from dsbp_jax.tracking import is_placeholder, matrix_views
from tests.layers.models import normal

ODD = {
    "bias": jnp.ones(3),
    "hole": None,
    "masked": optax.MaskedNode(),
    "function": jnp.tanh,
    "number": 0.5,
    "complex": jnp.ones((3, 2), jnp.complex64),
    "integers": jnp.ones((3, 2), jnp.int32),
    "flags": jnp.ones((3, 2), bool),
    "key": jax.random.key(0),
    "empty": jnp.ones((0, 4)),
    "empty stack": jnp.ones((0, 4, 4)),
}


def test_only_floating_matrices_with_entries_pass():
    views = matrix_views({**ODD, "w": jnp.ones((3, 2)), "n": np.ones((3, 2))}, None)
    assert set(views) == {"w", "n"}


def test_a_layout_does_not_make_odd_leaves_matrices():
    view = MatrixView((0,), (1,))
    layout = Layout(tuple((name, view) for name in ("complex", "empty", "w")))
    assert set(matrix_views({**ODD, "w": jnp.ones((3, 2))}, layout)) == {"w"}


def test_an_empty_module_is_no_placeholder():
    """A pytree node without leaves, as of a layer that has no parameters."""

    @jax.tree_util.register_pytree_node_class
    class Identity:
        def tree_flatten(self):
            return (), None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls()

    assert not is_placeholder(Identity())
    assert not any(map(is_placeholder, [None, {}, (), [], optax.MaskedNode()]))
    tx = dsbp_jax.spectral_projection(2)
    updates, _ = tx.update(Identity(), tx.init(Identity()), Identity())
    assert isinstance(updates, Identity)


def test_optax_asks_with_its_placeholder():
    seen = []
    init = lambda params: seen.append(is_placeholder(params))
    optax.tree.map_params(init, lambda leaf: leaf, None)
    assert seen == [True]


def test_a_layout_of_another_tree_names_the_nearest_path():
    layout = Layout((("params/w", MatrixView((0,), (1,))),))
    with pytest.raises(ValueError, match="params has no entry for 'params/w'"):
        matrix_views({"w": normal(3, 2)}, layout)
