"""Gradients through sketches, of leaves that are joined into one kernel."""

import jax
import jax.numpy as jnp
import pytest

from dsbp_jax import explain, spectral_backprop, spectral_coordinates
from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.rewrite import evaluate
from tests.layers.models import normal
from tests.layers.test_fused import MODELS, X, close, join


def mixed_loss(p, x):
    h = jnp.tanh(x @ p["first"])
    h = jnp.tanh(h @ join(1)(p))
    return jnp.mean(
        (jnp.concatenate([h, x], 1) @ jnp.concatenate([p["c"], p["d"]])) ** 2
    )


MIXED = {
    "first": normal(16, 16) / 4,
    "a": normal(16, 16, seed=1) / 4,
    "b": normal(16, 16, seed=2) / 4,
    "c": normal(32, 2, seed=3) / 4,
    "d": normal(16, 2, seed=4) / 4,
}
ROWS = normal(64, 16, seed=5)


@pytest.mark.slow
def test_sketches_leave_the_parts_whole():
    table = explain(mixed_loss, MIXED, ROWS, rank=4)
    assert table["a"].no_sketch == table["d"].no_sketch == "part of a fused kernel"
    assert "0% (part of a fused kernel)" in str(table)
    assert not table["first"].no_sketch
    wanted_value, wanted = jax.jit(jax.value_and_grad(mixed_loss))(MIXED, ROWS)

    backprop = spectral_backprop(mixed_loss, rank=4)
    state = jax.jit(backprop.init)(MIXED, ROWS, key=jax.random.key(0))
    value, grads, _ = jax.jit(backprop.value_and_grad)(MIXED, state, ROWS)
    close(value, wanted_value)
    jax.tree.map(close, grads | {"first": 0}, wanted | {"first": 0})

    coordinates = spectral_coordinates(mixed_loss, rank=4)
    coords, frame = jax.jit(coordinates.init)(MIXED, ROWS, key=jax.random.key(0))
    assert set(frame.kernels) == {"first"}
    value, grads = jax.jit(coordinates.value_and_grad)(coords, frame, ROWS)
    close(value, wanted_value)
    jax.tree.map(close, grads | {"first": 0}, wanted | {"first": 0})


def test_a_part_is_never_sketched():
    fused, _, params = MODELS["columns"]
    traced = trace(fused, params, (X,), {})

    def visit(product, x, w, basis):
        return product.sketched(x, w, basis, product.restrict(w, basis)), None

    with pytest.raises(ValueError, match="'a' is part of a fused kernel"):
        evaluate(
            traced, visit, array_leaves((params, X)), {n: jnp.eye(4, 2) for n in "ab"}
        )
