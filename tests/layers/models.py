"""Models of every library and shape, small enough to run eagerly."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

KEY = jax.random.key(0)


def normal(*shape, seed=0, dtype=jnp.float32):
    """Drawn by NumPy, which compiles no program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def filled(init, *args):
    """Parameters of the shapes that `init` would give, without compiling it."""
    generator = np.random.default_rng(0)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(KEY, leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(generator.normal(size=leaf.shape) / 2, leaf.dtype)

    return jax.tree.map(fill, eqx.filter_eval_shape(init, *args))


class Model(NamedTuple):
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    shapes: dict[str, tuple]  # site name -> shapes of inputs and outputs


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.gelu(nn.Conv(5, (1, 1))(x))
        x = nn.Dense(6)(x.reshape(x.shape[0], -1))
        return nn.Dense(1)(nn.LayerNorm()(x))


def linen_cnn():
    model, x = LinenCNN(), normal(2, 8, 8, 3)
    return Model(
        model.apply,
        filled(model.init, KEY, x),
        (x,),
        {
            "params/Conv_0/kernel": ((128, 3), (32, 4)),
            "params/Conv_1/kernel": ((32, 4), (32, 5)),
            "params/Dense_0/kernel": ((2, 80), (2, 6)),
            "params/Dense_1/kernel": ((2, 6), (2, 1)),
        },
    )


def linen_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)
    x = normal(2, 3, 8)
    shapes = {
        f"params/{name}/kernel": ((6, 8), (6, 8))
        for name in ("query", "key", "value", "out")
    }
    return Model(model.apply, filled(model.init, KEY, x), (x,), shapes)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1])(nn.relu(x)), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(LinenBlock, policy=jax.checkpoint_policies.dots_saveable),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="blocks")(x, None)[0]


def linen_scan_remat():
    model, x = LinenStack(), normal(2, 5, 4)
    return Model(
        model.apply,
        filled(model.init, KEY, x),
        (x,),
        {"params/blocks/Dense_0/kernel": ((3, 10, 4), (3, 10, 4))},
    )


def linen_rnn():
    model, x = nn.RNN(nn.SimpleCell(4)), normal(2, 5, 3)
    return Model(
        model.apply,
        filled(model.init, KEY, x),
        (x,),
        {
            "params/cell/i/kernel": ((10, 3), (10, 4)),
            "params/cell/h/kernel": ((10, 4), (10, 4)),
        },
    )


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.linear(x))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return NnxBlock(rngs)

        self.blocks = blocks(rngs)
        self.head = nnx.MultiHeadAttention(
            num_heads=2, in_features=4, decode=False, rngs=rngs
        )

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def body(block, x):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return self.head(body(self.blocks, x))


def nnx_scan_attention():
    graph, params = nnx.split(nnx.eval_shape(lambda: NnxStack(nnx.Rngs(0))))
    params = filled(lambda: params)
    shapes = {"blocks/linear/kernel": ((3, 6, 4), (3, 6, 4))}
    for name in ("query", "key", "value", "out"):
        shapes[f"head/{name}/kernel"] = ((6, 4), (6, 4))
    fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)
    return Model(fn, params, (normal(2, 3, 4),), shapes)


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 4, 3, stride=2, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        self.mlp = eqx.nn.MLP(4, 3, 5, 1, key=keys[2])

    def __call__(self, x):
        x = self.conv(x).reshape(4, -1).T
        return jax.vmap(self.mlp)(self.attention(x, x, x))


def equinox_net():
    shapes = {"conv/weight": ((98, 3), (18, 4))}
    for name in ("query", "key", "value", "output"):
        shapes[f"attention/{name}_proj/weight"] = ((18, 4), (18, 4))
    shapes["mlp/layers/0/weight"] = ((18, 4), (18, 5))
    shapes["mlp/layers/1/weight"] = ((18, 5), (18, 3))
    fn = lambda net, x: jax.vmap(net)(x)
    return Model(fn, filled(EquinoxNet, KEY), (normal(2, 3, 7, 7),), shapes)


def haiku_net():
    def net(x):
        x = jax.nn.relu(hk.Conv2D(4, 3, stride=2)(x)).reshape(x.shape[0], -1, 4)
        return hk.MultiHeadAttention(2, 3, w_init=hk.initializers.RandomNormal())(
            x, x, x
        )

    transformed, x = hk.without_apply_rng(hk.transform(net)), normal(2, 4, 4, 3)
    shapes = {"conv2_d/w": ((32, 3), (8, 4))}
    for name in ("query", "key", "value", "linear"):
        width = 6 if name == "linear" else 4
        shapes[f"multi_head_attention/{name}/w"] = ((8, width), (8, 6))
    return Model(transformed.apply, filled(transformed.init, KEY, x), (x,), shapes)


def tied_autoencoder():
    fn = lambda p, x: jnp.tanh(jnp.dot(x, p["w"])) @ p["w"].T
    shapes = {"w": ((5, 4), (5, 3)), "w#1": ((5, 3), (5, 4))}
    return Model(fn, {"w": normal(4, 3)}, (normal(5, 4),), shapes)


def nested_scans(params, x):
    def outer(h, stack):
        def inner(h, w):
            return jnp.tanh(h @ w + h @ params["shared"]), None

        return lax.scan(inner, h, stack)[0], h

    return lax.scan(outer, x, params["stacked"])


def plain_nested_scans():
    params = {"stacked": normal(3, 2, 4, 4), "shared": normal(4, 4, seed=1)}
    shapes = {
        "stacked": ((3, 2, 5, 4), (3, 2, 5, 4)),
        "shared": ((30, 4), (30, 4)),
    }
    return Model(nested_scans, params, (normal(5, 4, seed=2),), shapes)


def switch(params, x, index):
    branches = [
        lambda x: x @ params["a"],
        lambda x: jnp.sin(x) @ params["b"] @ params["a"],
        lambda x: x,
    ]
    return lax.switch(index, branches, x)


def plain_switch():
    params = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
    shapes = {name: ((5, 4), (5, 4)) for name in ("a", "b", "a#1")}
    return Model(switch, params, (normal(5, 4), jnp.int32(1)), shapes)


def plain_experts():
    fn = lambda p, x: jnp.einsum("ecd,efd->ecf", x, p["w"])
    return Model(
        fn, {"w": normal(2, 3, 4)}, (normal(2, 5, 4),), {"w": ((2, 5, 4), (2, 5, 3))}
    )


@jax.custom_vjp
def rounded(x, w):
    return jnp.round(x) @ w


rounded.defvjp(
    lambda x, w: (rounded(x, w), (x, w)),
    lambda res, g: (3.0 * g @ res[1].T, res[0].T @ g),
)


@jax.custom_jvp
def doubled(x, w):
    return 2.0 * (x @ w)


@doubled.defjvp
def _doubled_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return doubled(x, w), 5.0 * (dx @ w + x @ dw)


def plain_rules():
    fn = lambda p, x: doubled(rounded(x, p["a"]), p["b"])
    params = {"a": normal(4, 3), "b": normal(3, 2)}
    shapes = {"a": ((5, 4), (5, 3)), "b": ((5, 3), (5, 2))}
    return Model(fn, params, (normal(5, 4),), shapes)


def linen_fused_rnn():
    model, x = nn.RNN(nn.OptimizedLSTMCell(4)), normal(2, 5, 3)
    shapes = {
        f"params/cell/{side}{gate}/kernel": ((10, width), (10, 4))
        for side, width in (("h", 4), ("i", 3))
        for gate in "ifgo"
    }
    return Model(model.apply, filled(model.init, KEY, x), (x,), shapes)


class FusedAttention(eqx.Module):
    """Queries, keys and values in one product; their kernels are `(out, in)`."""

    to_query: jax.Array
    to_key: jax.Array
    to_value: jax.Array
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.to_query, self.to_key, self.to_value = (
            jax.random.normal(k, (4, 6)) for k in keys[:3]
        )
        self.out = eqx.nn.Linear(4, 6, key=keys[3])

    def __call__(self, x):
        kernel = jnp.concatenate([self.to_query, self.to_key, self.to_value])
        q, k, v = jnp.split(jax.vmap(lambda x: kernel @ x)(x), 3, axis=-1)
        return jax.vmap(self.out)(jax.nn.softmax(q @ k.T) @ v)


def equinox_fused_attention():
    shapes = {f"to_{name}": ((10, 6), (10, 4)) for name in ("query", "key", "value")}
    shapes["out/weight"] = ((10, 4), (10, 6))
    fn = lambda net, x: jax.vmap(net)(x)
    return Model(fn, filled(FusedAttention, KEY), (normal(2, 5, 6),), shapes)


def haiku_fused_gates():
    """`[x, h] @ [[W_x], [W_h]]`: a kernel of blocks on both of its axes."""

    def net(x):
        init = hk.initializers.RandomNormal()
        get = lambda name, rows: hk.get_parameter(name, (rows, 3), init=init)
        of_x = jnp.concatenate([get("forget_x", 4), get("update_x", 4)], axis=1)
        of_h = jnp.concatenate([get("forget_h", 3), get("update_h", 3)], axis=1)
        kernel = jnp.concatenate([of_x, of_h])
        h = jnp.zeros((x.shape[0], 3))
        for _ in range(2):
            f, u = jnp.split(jnp.concatenate([x, h], axis=1) @ kernel, 2, axis=1)
            h = jax.nn.sigmoid(f) * h + jnp.tanh(u)
        return h

    transformed, x = hk.without_apply_rng(hk.transform(net)), normal(5, 4)
    shapes = {
        f"~/{gate}_{name}{use}": ((5, width), (5, 3))
        for use in ("", "#1")
        for name, width in (("x", 4), ("h", 3))
        for gate in ("forget", "update")
    }
    return Model(transformed.apply, filled(transformed.init, KEY, x), (x,), shapes)


CLOSED_OVER = np.asarray(normal(5, 4, seed=2))


@jax.jit
def meets_data(w):
    """A product with data that the body of a call holds, not its operands."""
    return jnp.tanh(CLOSED_OVER @ w)


rule_jvp = jax.custom_jvp(lambda w: meets_data(w))
rule_jvp.defjvp(lambda primals, tangents: jax.jvp(meets_data, primals, tangents))
rule_vjp = jax.custom_vjp(lambda w: meets_data(w))
rule_vjp.defvjp(lambda w: jax.vjp(meets_data, w), lambda back, g: back(g))

# Calls of a kernel `(4, 4)`, whose operands are parameters or literals only.
CLOSURES = {
    "jit": meets_data,
    "jit_twice": jax.jit(lambda w: meets_data(w) + 1.0),
    "remat": jax.checkpoint(meets_data),
    "custom_jvp": rule_jvp,
    "custom_vjp": rule_vjp,
    "cond": lambda w: lax.cond(w[0, 0] > 9, lambda w: 0 * meets_data(w), meets_data, w),
    "scan_ys": lambda w: lax.scan(lambda c, w: (c, meets_data(w)), 0.0, w[None])[1][0],
    "scan_carry": lambda w: lax.scan(
        lambda c, w: (c + meets_data(w), None), jnp.zeros((5, 4)), w[None]
    )[0],
}


BUILDERS = (
    linen_cnn,
    linen_attention,
    linen_scan_remat,
    linen_rnn,
    nnx_scan_attention,
    equinox_net,
    haiku_net,
    tied_autoencoder,
    plain_nested_scans,
    plain_switch,
    plain_experts,
    plain_rules,
    linen_fused_rnn,
    equinox_fused_attention,
    haiku_fused_gates,
)
