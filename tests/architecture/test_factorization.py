import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from tests.architecture import models
from tests.architecture.test_compression import close
from tests.layers.models import normal


def low_rank(rng, *shape, rank):
    """`(…, d_in, d_out)` of that rank."""
    *stack, d_in, d_out = shape
    left, right = rng.normal(size=(*stack, d_in, rank)), rng.normal(size=(rank, d_out))
    return jnp.asarray(left @ right, jnp.float32)


def test_planted_ranks_are_found_in_any_layout():
    """A dense kernel (in, out), one (out, in), a stack, and a convolution."""
    rng = np.random.default_rng(0)

    def fn(params, x):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x,
                params["conv"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        ).mean((1, 2))
        x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]
        return jnp.sin(x @ params["dense"]) @ params["turned"].T + params["bias"]

    conv = rng.normal(size=(8, 2)) @ rng.normal(size=(2, 9 * 16))
    params = {
        "conv": jnp.asarray(
            conv.reshape(8, 3, 3, 16).transpose(1, 2, 0, 3), jnp.float32
        ),
        "stack": low_rank(rng, 2, 16, 16, rank=5),
        "dense": low_rank(rng, 16, 16, rank=3),
        "turned": low_rank(rng, 16, 16, rank=4).T,
        "bias": normal(16),
    }
    x = normal(60, 4, 4, 8)
    thin, small = architecture.factorize(fn, params, [x], energy=1.0)
    shapes = jax.tree.map(jnp.shape, small["factors"])
    assert shapes == {
        "conv": {"a": (8, 2), "b": (9, 2, 16)},
        "stack": {"a": (2, 16, 5), "b": (2, 1, 5, 16)},
        "dense": {"a": (16, 3), "b": (1, 3, 16)},
        "turned": {"a": (16, 4), "b": (1, 4, 16)},
    }
    assert small["params"]["bias"] is params["bias"]
    close(jax.jit(thin)(small, x), jax.jit(fn)(params, x), 1e-4)
    close(jax.jit(thin)(small, x[:7]), jax.jit(fn)(params, x[:7]), 1e-4)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(thin(p, x) ** 2)))(small)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads["factors"]))


def test_errors_are_those_of_the_answers():
    """Beside the rank that the kernel alone would ask for."""
    x = normal(200, 12) * jnp.geomspace(1, 1e-3, 12)
    params = {"w": normal(12, 12, seed=1)}
    fn = lambda params, x: x @ params["w"]
    thin, small = architecture.factorize(fn, params, [x[:100], x[100:]], energy=0.99)
    wanted = np.linalg.svd(np.asarray(x @ params["w"]), compute_uv=False) ** 2
    rank = small["factors"]["w"]["a"].shape[1]
    share = lambda k: wanted[k:].sum() / wanted.sum()
    assert share(rank) <= 0.01 < share(rank - 1)
    lost = jnp.sum((thin(small, x) - fn(params, x)) ** 2) / wanted.sum()
    assert float(lost) == pytest.approx(share(rank), rel=1e-3)


def test_flops_are_kept_to():
    model = models.plain_mlp()
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params = {"a": normal(40, 30), "b": normal(30, 20)}
    x = normal(100, 40)
    _, small = architecture.factorize(fn, params, [x], flops=0.5)
    kept = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert 0.4 * 1800 < kept <= 0.5 * 1800
    with pytest.raises(ValueError, match="no plan keeps flops"):
        architecture.factorize(fn, params, [x], flops=0.01)
    with pytest.raises(ValueError, match="saves no operations"):
        architecture.factorize(model.fn, model.params, [model.x], energy=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of energy and flops must be given, got none"),
        ({"energy": 2.0}, r"energy must be a number in \(0, 1\], got 2.0"),
    ],
)
def test_bad_input_is_one_clear_line(options, message):
    model = models.plain_mlp()
    with pytest.raises(ValueError, match=message):
        architecture.factorize(model.fn, model.params, [model.x], **options)
    with pytest.raises(ValueError, match="at least one batch"):
        architecture.factorize(model.fn, model.params, [], energy=0.5)


def test_ranks_go_by_what_the_outputs_lose():
    def fn(params, x):
        for branch in params["branches"]:
            x = x + 0.1 * jax.nn.relu(x @ branch["up"]) @ branch["down"]
        return x @ params["head"]

    branch = lambda seed: {
        "up": normal(24, 24, seed=seed) / 5,
        "down": normal(24, 24, seed=seed + 1) / 5,
    }
    params = {
        "branches": [branch(seed) for seed in (1, 3)],
        "head": normal(24, 24, seed=9) / 5,
    }
    x = normal(200, 24, seed=11)
    thin, small = architecture.factorize(fn, params, [x], flops=0.5)
    assert "head" not in small["factors"]
    lost = jnp.sum((thin(small, x) - fn(params, x)) ** 2) / jnp.sum(fn(params, x) ** 2)
    assert lost < 0.02
