"""No result shares a buffer with what the caller holds, and may donate."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import dsbp_jax
from tests.backprop.models import mlp, random_frame


def buffers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def arrays(tree):
    """Without keys, which hide their buffer."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    unwrap = lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf
    return jax.tree.map(unwrap, tree)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_coordinates_share_no_buffer_with_what_the_caller_holds(compiled):
    wrap = jax.jit if compiled else lambda fn: fn
    case = mlp()
    training, tx = dsbp_jax.spectral_coordinates(case.loss, 4), optax.adam(1e-2)
    held = [case.params, case.x]
    coords, frame = wrap(training.init)(case.params, case.x, key=jax.random.key(0))
    for new in (coords, frame):
        assert not buffers(held) & buffers(new)
        held.append(new)
    merged = wrap(training.merge)(coords, frame)
    assert not buffers(held) & buffers(merged)
    held += [merged, state := tx.init(coords)]
    folded = wrap(training.fold)(coords, frame, state, case.x)
    for new in folded:
        assert not buffers(held) & buffers(new)
        held.append(new)


@pytest.mark.parametrize("compiled", [False, True])
def test_sketches_share_no_buffer_with_what_the_caller_holds(compiled):
    wrap = jax.jit if compiled else lambda fn: fn
    case, key = mlp(), jax.random.key(0)
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=8)
    held = [arrays(case.params), case.x, arrays(key)]
    state = wrap(backprop.init)(case.params, case.x, key=key)
    assert not buffers(held) & buffers(arrays(state))
    held.append(arrays(state))
    for new in (
        wrap(backprop.value_and_grad)(case.params, state, case.x),
        wrap(backprop.catch_up)(case.params, state, case.x, every=4),
        wrap(backprop.refresh)(case.params, state, case.x),
    ):
        assert not buffers(held) & buffers(arrays(new))


def test_params_and_merged_kernels_outlive_donated_steps():
    case = mlp()
    params = jax.tree.map(jnp.copy, case.params)
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = training.init(params, case.x, key=jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(coords, frame):
        grads = training.value_and_grad(coords, frame, case.x)[1]
        return jax.tree.map(lambda c, g: c - g / 10, coords, grads)

    merged = training.merge(coords, frame)
    step(coords, frame)
    kept = jax.tree.leaves((params, merged, frame))
    assert not any(leaf.is_deleted() for leaf in kept)


def test_value_and_grad_copies_nothing_whole():
    case = mlp()
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    jaxpr = jax.make_jaxpr(training.value_and_grad)(coords, frame, case.x)
    assert not [e for e in jaxpr.eqns if e.primitive.name == "copy"]
