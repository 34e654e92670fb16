"""Roles by dataflow."""

import jax
import jax.numpy as jnp
import pytest

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


def test_muon_of_roles_sees_kernels_as_the_model_does():
    """By their shape the kernels of eight heads would be a stack of 32 matrices."""

    def model(params, x):
        x = jnp.tanh(x @ params["first"])
        queries = jnp.einsum("nd,dhe->nhe", x, params["query"])
        return jnp.tanh(queries).reshape(len(x), -1) @ params["head"]

    shapes = {"first": (6, 32), "query": (32, 8, 4), "head": (32, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    roles = dsbp_jax.roles(model, params, jnp.ones((5, 6)))
    assert roles.layout == dsbp_jax.layout(model, params, jnp.ones((5, 6)))
    state = dsbp_jax.spectral_muon(0.1, 2, hidden=roles).init(params)
    given = dsbp_jax.spectral_muon(0.1, 2, hidden=[*roles], layout=roles.layout)
    bases = lambda state: jax.tree.map(jnp.shape, dsbp_jax.bases(state)["query"])
    assert bases(state) == bases(given.init(params))
    by_shape = dsbp_jax.spectral_muon(0.1, 2, hidden=dict(roles)).init(params)
    assert bases(state) != bases(by_shape)
    changed = roles.replace({"first": "other"})
    state = dsbp_jax.spectral_muon(0.1, 2, hidden=changed).init(params)
    assert set(dsbp_jax.bases(state)) == {"query"}
    with pytest.raises(ValueError, match="got 'frist'; accepted are first, head"):
        roles.replace({"frist": "other"})
    with pytest.raises(ValueError, match="layout must be that of the coordinates"):
        dsbp_jax.spectral_muon(0.1, 2, hidden=roles, sizes={"first": (6, 32)})
