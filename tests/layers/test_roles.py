"""Roles by dataflow."""

import jax
import jax.numpy as jnp

import dsbp_jax


def test_residual_blocks_tied_embeddings_and_several_heads():
    def model(params, tokens):
        x = params["embedding"][tokens]
        x = x + jnp.tanh(x @ params["up"]) @ params["down"]
        value = x @ params["value"]
        return x @ params["embedding"].T, value * params["scale"]

    params = {
        "embedding": jnp.ones((9, 4)),
        "up": jnp.ones((4, 8)),
        "down": jnp.ones((8, 4)),
        "value": jnp.ones((4, 1)),
        "scale": jnp.ones(1),
    }
    assert dsbp_jax.roles(model, params, jnp.array([1, 2])) == {
        "embedding": "embedding",
        "up": "hidden",
        "down": "hidden",
        "value": "head",
        "scale": "other",
    }


def test_scanned_stacks_and_the_first_layer():
    def model(params, x):
        x = x @ params["first"]
        step = lambda x, w: (x + jnp.tanh(x @ w), None)
        x, _ = jax.lax.scan(step, x, params["stack"])
        return x @ params["head"]

    params = {
        "first": jnp.ones((3, 4)),
        "stack": jnp.ones((2, 4, 4)),
        "head": jnp.ones((4, 2)),
        "unused": jnp.ones((4, 2)),
    }
    assert dsbp_jax.roles(model, params, jnp.ones((5, 3))) == {
        "first": "first",
        "stack": "hidden",
        "head": "head",
        "unused": "other",
    }
