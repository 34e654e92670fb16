"""Losses of every kind of layer, small, with enough rows for a sketch to pay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsbp_jax import layout
from dsbp_jax.backprop.columns import Columns, find_layers
from dsbp_jax.backprop.frame import split
from dsbp_jax.backprop.sketch import SketchState
from dsbp_jax.layers import trace
from tests.layers.models import normal


class Case(NamedTuple):
    loss: Any
    params: Any
    x: jax.Array
    sketched: tuple[str, ...]  # paths, for 4 columns


def mean_square(y):
    return jnp.mean(y.astype(jnp.float32) ** 2) * 4


def mlp(activation=jax.nn.relu):
    def loss(params, x):
        h = activation(x @ params["a"] + params["bias"][None])
        return mean_square(activation(h @ params["b"]) @ params["c"])

    params = {
        "a": normal(12, 16) / 4,
        "b": normal(16, 14, seed=1) / 4,
        "c": normal(14, 1, seed=2),
        "bias": normal(16, seed=3) / 8,
    }
    return Case(loss, params, normal(64, 12, seed=4), ("a", "b"))


def convolution():
    def loss(params, x):
        convolve = lambda x, w, **options: lax.conv_general_dilated(
            x, w, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )
        h = jax.nn.relu(convolve(x, params["first"], window_strides=(1, 1)))
        h = convolve(h, params["second"], window_strides=(2, 2), rhs_dilation=(2, 1))
        return mean_square(h.sum((1, 2)) @ params["head"])

    params = {
        "first": normal(3, 3, 10, 12) / 9,
        "second": normal(3, 2, 12, 11, seed=1) / 9,
        "head": normal(11, 3, seed=2),
    }
    return Case(loss, params, normal(4, 8, 8, 10, seed=3), ("first", "second"))


def channels_first():
    def loss(params, x):
        y = lax.conv_general_dilated(x, params["w"], (1,), "VALID")  # NCW, OIW
        return mean_square(jnp.sin(y))

    return Case(loss, {"w": normal(9, 10, 3) / 5}, normal(6, 10, 12, seed=1), ("w",))


def attention():
    def loss(params, x):
        project = lambda name: jnp.einsum("bse,ehd->bshd", x, params[name])
        scores = jnp.einsum("bqhd,bkhd->bhqk", project("query"), project("key"))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), project("value"))
        return mean_square(jnp.einsum("bqhd,hde->bqe", mixed, params["out"]))

    params = {
        name: normal(12, 3, 4, seed=i) / 4
        for i, name in enumerate(("query", "key", "value"))
    }
    params["out"] = normal(3, 4, 12, seed=3) / 4
    return Case(loss, params, normal(4, 10, 12, seed=4), tuple(params))


def scanned():
    def loss(params, x):
        @jax.checkpoint
        def block(h, w):
            return jnp.tanh(h @ w["in"]) @ w["out"], None

        return mean_square(lax.scan(block, x, params)[0])

    params = {"in": normal(3, 10, 12) / 4, "out": normal(3, 12, 10, seed=1) / 4}
    return Case(loss, params, normal(40, 10, seed=2), ("in", "out"))


def recurrent():
    def loss(params, x):
        step = lambda h, x: (jnp.tanh(h @ params["h"] + x @ params["x"]), None)
        return mean_square(lax.scan(step, jnp.zeros((8, 12)), x)[0])

    params = {"h": normal(12, 12) / 4, "x": normal(10, 12, seed=1) / 4}
    return Case(loss, params, normal(6, 8, 10, seed=2), ("h", "x"))


def left():
    """The weight is the left operand, transposed, in an ensemble of experts."""

    def loss(params, x):
        each = jax.vmap(lambda w, x: jax.vmap(lambda row: w @ row)(x))
        return mean_square(jnp.sin(each(params["experts"], x)))

    return Case(
        loss, {"experts": normal(3, 9, 12) / 4}, normal(3, 40, 12, seed=1), ("experts",)
    )


def tied():
    def loss(params, x):
        return mean_square(jnp.tanh(x @ params["w"]) @ params["w"].T) + 0.1 * jnp.sum(
            params["w"] ** 2
        )

    return Case(loss, {"w": normal(12, 10) / 4}, normal(40, 12, seed=1), ("w",))


def branches():
    def loss(params, x):
        forward = lambda x: lax.cond(
            x[0, 0] > 0, lambda x: x @ params["a"], lambda x: x @ params["b"], x
        )
        return mean_square(jax.jit(forward)(jnp.cos(x)))

    params = {"a": normal(12, 10), "b": normal(12, 10, seed=1)}
    return Case(loss, params, normal(40, 12, seed=2), ("a", "b"))


CASES = {
    case.__name__: case
    for case in (
        mlp,
        convolution,
        channels_first,
        attention,
        scanned,
        recurrent,
        left,
        tied,
        branches,
    )
}


def one_layer():
    """A single sketched layer: the least to compile."""

    def loss(params, x):
        return mean_square(jnp.tanh(x @ params["w"]) @ params["head"])

    params = {"w": normal(12, 16) / 4, "head": normal(16, 1, seed=1)}
    # Its third eigenvalue is well above the fourth.
    return Case(loss, params, normal(64, 12, seed=4), ("w",))


def random_columns(case, rank):
    """Columns that follow nothing, and the layout of those who have some."""
    traced = trace(case.loss, case.params, (case.x,), {})
    found = find_layers(traced, rank, has_aux=False)
    columns = Columns(rank=rank, tracking=0)
    return columns.init(case.params, found, jax.random.key(3)), found


def sketch_state(case, rank):
    """What `init` gives, without solving for anything."""
    return SketchState(jax.random.key(4), random_columns(case, rank)[0])


def random_frame(case, rank):
    """Coordinates at zero in random columns."""
    return split(case.params, *random_columns(case, rank))


def projected(case, gradient, columns):
    """The dense projection of an exact gradient on columns, leaf by leaf."""
    views = layout(case.loss, case.params, case.x)
    result = dict(gradient)
    for path, basis in columns.items():
        view = views[path]
        matrix = view.to_matrix(gradient[path])
        basis = basis[..., None, :, :]
        matrix = basis @ (basis.mT @ matrix)
        result[path] = view.from_matrix(matrix, gradient[path].shape)
    return result
