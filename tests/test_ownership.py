import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import meta
from dsbp_jax.ownership import own
from tests.layers.models import normal

import optax  # isort: skip


def donate(tree):
    """Deletes the buffers of a tree, as a step that donates it does."""
    step = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    jax.block_until_ready(step(tree))


@pytest.mark.parametrize("jitted", [False, True])
def test_copies_outlive_what_they_were_made_from(jitted):
    tree = {"w": normal(4, 3), "name": None}
    copy = (jax.jit(own) if jitted else own)(tree)
    expected = np.asarray(tree["w"]).copy()
    donate(tree)
    np.testing.assert_array_equal(copy["w"], expected)


def test_numpy_and_other_leaves():
    array = np.ones(3)
    tree = own({"n": array, "f": jnp.tanh, "x": 2.0})
    array[0] = 5
    np.testing.assert_array_equal(tree["n"], 1)
    assert tree["f"] is jnp.tanh
    assert tree["x"] == 2.0


@pytest.mark.parametrize("jitted", [False, True])
def test_what_is_not_adapted_is_no_part_of_the_start(jitted):
    params = {"body": {"w": normal(3, 3)}, "head": {"w": normal(3, 1, seed=1)}}
    loss = lambda p, x: jnp.mean((x @ p["body"]["w"] @ p["head"]["w"] - 1) ** 2)
    learner = meta.anil(loss, optax.sgd(0.1), 1, head="head")
    adapt = jax.jit(learner.adapt) if jitted else learner.adapt
    adapted = adapt(params, normal(5, 3, seed=2))
    donate(params)
    assert not adapted["body"]["w"].is_deleted()
