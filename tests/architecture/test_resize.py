"""Whatever a width passes through is run at another size, and computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from tests.architecture.test_axis_rules import PASSES, ROWS, WIDTH
from tests.architecture.test_compression import close
from tests.layers.models import normal


def gate(h):
    a, b = jnp.split(h, 2, axis=-1)
    return a * jax.nn.sigmoid(b)


def sliced_gate(h):
    return h[:, : WIDTH // 2] * jnp.tanh(h[:, WIDTH // 2 :])


def zeros_of_its_size(h):
    return jnp.maximum(h, jnp.zeros(WIDTH)) + jnp.full((ROWS, WIDTH), 0.5)


def embedded(h):
    """A table of rows, looked up: its columns are the width."""
    return h[jnp.arange(ROWS)[::-1]]


def written_in_a_loop(h):
    def body(i, out):
        row = jax.lax.dynamic_slice(h, (i, 0), (1, WIDTH))
        return jax.lax.dynamic_update_slice(out, jnp.cos(row), (i, 0))

    return jax.lax.fori_loop(0, ROWS, body, jnp.zeros_like(h))


MORE = {
    "gate": gate,
    "sliced gate": sliced_gate,
    "zeros": zeros_of_its_size,
    "looked up": embedded,
    "written in a loop": written_in_a_loop,
}


@pytest.mark.parametrize("name", [*PASSES, *MORE])
def test_copies_are_cut_and_the_rest_computes_the_same(name):
    between = {**PASSES, **MORE}[name]

    def fn(params, x):
        return between(x @ params["up"]) @ params["down"]

    out = jax.eval_shape(between, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))
    up = np.array(normal(3, 3, 4))
    up[:, :, 3] = up[:, :, 0]  # alike whether the width is taken as 12 or as 3 × 4
    if "gate" in name:
        up[:, 2] = up[:, 1] = up[:, 0]  # ... or as twice 6
    params = {
        "up": jnp.asarray(up.reshape(3, WIDTH)),
        "down": normal(out.shape[-1], 2, seed=1),
    }
    xs = normal(ROWS, 3, seed=2), normal(ROWS, 3, seed=3)
    plan = architecture.plan(fn, params, xs, energy=1.0, multiple_of=1)
    small = architecture.compress(fn, params, plan)
    assert small.params["up"].size <= (3 * 9 if "gate" not in name else 3 * 10)
    # XLA may leave a rounding to bfloat16 out of one of two programs.
    tolerance = 2**-7 if name == "cast" else 1e-5
    for x in xs:
        found = jax.jit(small.apply)(small.params, x)
        close(found, jax.jit(fn)(params, x), tolerance)


def test_parts_side_by_side_are_cut_apart():
    def fn(params, x):
        h = jnp.concatenate([x @ params["a"], jnp.tanh(x @ params["b"])], axis=-1)
        return h @ params["down"]

    params = {"a": normal(3, 4), "b": normal(3, 6), "down": normal(10, 2)}
    params["b"] = params["b"].at[:, 4:].set(params["b"][:, :2])
    x = normal(30, 3)
    plan = architecture.plan(fn, params, [x], energy=1.0, multiple_of=1)
    small = architecture.compress(fn, params, plan)
    # Of a linear part only what two answers need.
    shapes = {name: leaf.shape for name, leaf in small.params.items()}
    assert shapes == {"a": (3, 2), "b": (3, 4), "down": (6, 2)}
    close(small.apply(small.params, x), fn(params, x), 1e-5)
