"""Models of every library, and redundancy planted into them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsbp_jax.layers import map_paths
from tests.layers.models import filled, normal

KEY = jax.random.key(0)


class Model(NamedTuple):
    fn: Callable[[Any, Any], Any]
    params: Any
    x: Any


def plain_mlp():
    def fn(params, x):
        x = jax.nn.relu(x @ params["up"] + params["up_bias"])
        x = jax.nn.gelu(x @ params["mid"] + params["mid_bias"])
        return x @ params["down"] + params["down_bias"]

    shapes = {
        "up": (6, 16),
        "up_bias": (16,),
        "mid": (16, 24),
        "mid_bias": (24,),
        "down": (24, 3),
        "down_bias": (3,),
    }
    params = {
        name: normal(*shape, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return Model(fn, params, normal(200, 6, seed=9))


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(3)(nn.tanh(nn.Dense(12)(x)))


def linen_mlp():
    model, x = LinenMlp(), normal(200, 6, seed=9)
    return Model(model.apply, filled(model.init, KEY, x), x)


def nnx_mlp():
    build = lambda: nnx.Sequential(
        nnx.Linear(6, 16, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(16, 3, rngs=nnx.Rngs(1)),
    )
    graph, params = nnx.split(nnx.eval_shape(build))
    fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)
    return Model(fn, filled(lambda: params), normal(200, 6, seed=9))


def equinox_mlp():
    build = lambda key: eqx.nn.MLP(6, 3, 16, 2, key=key)
    fn = lambda net, x: jax.vmap(net)(x)
    return Model(fn, filled(build, KEY), normal(200, 6, seed=9))


def haiku_mlp():
    transformed = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([16, 12, 3])(x))
    )
    x = normal(200, 6, seed=9)
    return Model(transformed.apply, filled(transformed.init, KEY, x), x)


class LinenResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width in (8, 12):
            y = nn.relu(norm()(nn.Conv(10, (3, 3), use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), strides=width // 8, use_bias=False)(y))
            if width != x.shape[-1]:
                x = nn.Conv(width, (1, 1), strides=1, use_bias=False)(x)
            x = nn.relu(x + y)
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


def linen_resnet():
    model, x = LinenResNet(), normal(20, 4, 4, 3, seed=9)
    return Model(model.apply, positive(filled(model.init, KEY, x)), x)


def positive(params):
    """The variances of batch norm are not negative."""
    return map_paths(
        lambda path, leaf: jnp.abs(leaf) if "var" in path else leaf, params
    )


class Depthwise(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(8, 8, 3, groups=8, key=keys[1]),
            eqx.nn.Conv2d(8, 6, 1, key=keys[2]),
            eqx.nn.Linear(6 * 4, 2, key=keys[3]),
        ]

    def __call__(self, x):
        for layer in self.layers[:3]:
            x = jax.nn.relu(layer(x))
        return self.layers[3](x.reshape(-1))


def equinox_depthwise():
    fn = lambda net, x: jax.vmap(net)(x)
    return Model(fn, filled(Depthwise, KEY), normal(30, 3, 4, 4, seed=9))


def haiku_cnn():
    def net(x):
        x = jax.nn.relu(hk.Conv2D(8, 3, padding="VALID")(x))
        x = jax.nn.relu(hk.Conv2D(6, 3, padding="VALID")(x))
        return hk.Linear(2)(x.mean((1, 2)))

    transformed, x = (
        hk.without_apply_rng(hk.transform(net)),
        normal(30, 6, 6, 3, seed=9),
    )
    return Model(transformed.apply, filled(transformed.init, KEY, x), x)


def nnx_cnn():
    def build():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), rngs=rngs),
            nnx.BatchNorm(8, use_running_average=True, rngs=rngs),
            nnx.relu,
            nnx.Conv(8, 6, (3, 3), rngs=rngs),
            nnx.relu,
            lambda x: x.reshape(x.shape[0], -1),
            nnx.Linear(96, 2, rngs=rngs),
        )

    graph, params = nnx.split(nnx.eval_shape(build))
    fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)
    return Model(fn, positive(filled(lambda: params)), normal(30, 4, 4, 3, seed=9))


def planted(model, found, count):
    """Leaves in which of each group the last `count` neurons say nothing of their own.

    The last is dead, the others are copies of the first ones: of each leaf that brings
    the width, and not of those that contract it.
    """
    taken = {
        (site.path, axis)
        for site in found.structure.traced.sites
        for axis in site.view.input_axes
    }
    edits = {}
    for group in found.groups:
        for place in group.places:
            if group.reason == "" and (place.path, place.axis) not in taken:
                edits.setdefault(place.path, []).append(place.axis)

    def edit(path, leaf):
        for axis in edits.get(path, []):
            size = leaf.shape[axis]
            index = np.arange(size)
            index[size - count :] = np.arange(count)
            leaf = jnp.take(leaf, index, axis=axis)
            if "var" not in path:
                alive = jnp.arange(size) < size - 1
                shape = [size if a == axis else 1 for a in range(leaf.ndim)]
                leaf = jnp.where(alive.reshape(shape), leaf, 0)
        return leaf

    return map_paths(edit, model.params)


MLPS = (plain_mlp, linen_mlp, nnx_mlp, equinox_mlp, haiku_mlp)
CNNS = (linen_resnet, equinox_depthwise, haiku_cnn, nnx_cnn)


class LinenBlock(nn.Module):
    """Pre-norm attention and MLP, as a step of a loop or alone."""

    width: int = 16
    heads: int = 2

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(h), None


class LinenVit(nn.Module):
    """Patches, two blocks (unrolled or scanned), a mean and a head."""

    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (2, 2), strides=2)(x)
        x = x.reshape(x.shape[0], -1, 16)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 16))
        if self.scanned:
            stack = nn.scan(
                LinenBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            x = stack(name="blocks")(x, None)[0]
        else:
            for _ in range(2):
                x, _ = LinenBlock()(x)
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


def linen_vit(scanned=False):
    model, x = LinenVit(scanned), normal(12, 4, 4, 3, seed=9)
    return Model(model.apply, filled(model.init, KEY, x), x)


def linen_scanned():
    return linen_vit(scanned=True)
