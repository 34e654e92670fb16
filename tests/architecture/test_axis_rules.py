"""One operation between two kernels: is the width found, and if not why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from tests.layers.models import normal

WIDTH, ROWS = 12, 40
CLOSED_OVER = np.linspace(0.5, 1, WIDTH, dtype=np.float32)


def found(between, rows=ROWS, width=WIDTH):
    """The groups of `x @ up`, something, `@ down`."""

    def fn(params, x):
        return between(x @ params["up"]) @ params["down"]

    out = jax.eval_shape(between, jax.ShapeDtypeStruct((rows, width), jnp.float32))
    params = {"up": normal(3, width), "down": normal(out.shape[-1], 2)}
    return architecture.groups(fn, params, normal(rows, 3))


PASSES = {
    "activation": jnp.tanh,
    "custom rule": jax.nn.relu,
    "cast": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
    "transposes": lambda h: h.T[:, None, :].transpose(2, 1, 0)[:, 0],
    "heads": lambda h: (
        jnp.tanh(h.reshape(ROWS, 3, 4))
        .transpose(1, 0, 2)
        .swapaxes(0, 1)
        .reshape(ROWS, WIDTH)
    ),
    "rows merged": lambda h: jnp.sin(h.reshape(ROWS, 1, WIDTH)).reshape(ROWS, WIDTH),
    "mean of rows": lambda h: h - h.mean(0, keepdims=True),
    "where": lambda h: jnp.where(h > 0, h, 0.1 * h),
    "rows padded": lambda h: jnp.pad(h, ((1, 1), (0, 0))),
    "rows sorted": lambda h: jnp.sort(h, axis=0),
    "running sum of rows": lambda h: jnp.cumsum(h, axis=0),
    "rows looked up": lambda h: h[jnp.array([1, 0, 2])],
    "a row written": lambda h: jax.lax.dynamic_update_slice(h, 2 * h[:1], (1, 0)),
    "branches": lambda h: jax.lax.cond(h.sum() > 0, jnp.tanh, lambda h: 2 * h, h),
    "loop": lambda h: jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h), h),
    "remat": jax.checkpoint(lambda h: jnp.tanh(h)),
    "pooling of rows": lambda h: jax.lax.reduce_window(
        h, -jnp.inf, jax.lax.max, (2, 1), (2, 1), "VALID"
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_width_passes(name):
    groups = found(PASSES[name])
    places = {
        (place.path, place.axis) for group in groups.groups for place in group.places
    }
    assert places == {("up", 1), ("down", 0)}, groups


STOPS = {
    "softmax": (lambda h: jax.nn.softmax(h), "reduced by reduce_max"),
    "sort": (lambda h: jnp.sort(h, axis=-1), "sort runs along it"),
    "running sum": (lambda h: jnp.cumsum(h, axis=-1), "cumsum runs along it"),
    "pad": (lambda h: jnp.pad(h, ((0, 0), (1, 0))), "padded"),
    "reversed": (lambda h: h[:, ::-1], "rev"),
    "looked up": (lambda h: h[:, jnp.array([1, 0, 2])], "looked up by index"),
    "every second": (lambda h: h[:, ::2], "sliced"),
    "closed over": (lambda h: h * CLOSED_OVER, r"shape \(12,\) that the function"),
    "counted": (
        lambda h: (ones := jnp.ones_like(h)) * h / ones.sum(-1, keepdims=True),
        "counted: a sum",
    ),
    "numbered": (lambda h: h * jnp.arange(WIDTH, dtype=h.dtype), "numbered by iota"),
    "while": (
        lambda h: jax.lax.while_loop(lambda h: h.sum() > 9, lambda h: h / 2, h),
        "met by while",
    ),
    "transposed reshape": (
        lambda h: (
            jnp.swapaxes(h.reshape(ROWS, 3, 4), 1, 2)
            .reshape(ROWS, 6, 2)
            .reshape(ROWS, 12)
        ),
        "whole factors",
    ),
    "grouped convolution": (
        lambda h: jax.lax.conv_general_dilated(
            h[:, None],
            jnp.ones((1, 4, WIDTH)),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=3,
        )[:, 0],
        "grouped convolution",
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_width_is_fixed_and_the_reason_named(name):
    between, reason = STOPS[name]
    groups = found(between)
    assert not any(
        place.path == "up" and place.axis == 1
        for group in groups.groups
        for place in group.places
    )
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(groups.reasons["up", 1])


def test_a_normalisation_sums_over_its_width():
    group = found(lambda h: h / jnp.sqrt(jnp.square(h).sum(-1, keepdims=True)))["up"]
    assert group.merged
    assert not group.rotated


def test_halves_of_a_gate_are_one_width_twice():
    def gate(h):
        a, b = jnp.split(h, 2, axis=-1)
        return a * jax.nn.sigmoid(b)

    group = found(gate)["up"]
    assert group.size == WIDTH // 2
    assert [tuple(place) for place in group.places] == [
        ("down", 0, 0),
        ("up", 1, 0),
        ("up", 1, 1),
    ]


def test_parts_side_by_side_are_groups_of_their_own():
    def fn(params, x):
        h = jnp.concatenate([x @ params["a"], jnp.tanh(x @ params["b"])], axis=-1)
        return h @ params["down"]

    params = {"a": normal(3, 4), "b": normal(3, 5), "down": normal(9, 2)}
    groups = architecture.groups(fn, params, normal(6, 3))
    assert {name: group.size for name, group in groups.items()} == {"a": 4, "b": 5}
    assert groups["a"].rotated
    assert not groups["b"].rotated


def test_only_linear_maps_let_a_rotation_pass():
    linear = {
        "nothing": lambda h: h,
        "scaled": lambda h: 3 * h / 7,
        "mixed rows": lambda h: jnp.ones((4, ROWS)) @ h,
        "negated": lambda h: -h,
    }
    for between in linear.values():
        assert found(between)["up"].rotated
    for between in (
        jnp.tanh,
        lambda h: h + 1,
        lambda h: h * h,
        lambda h: jnp.sort(h, 0),
    ):
        assert not found(between)["up"].rotated
