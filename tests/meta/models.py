"""Small models, tasks and a plain-loop reference for the tests of meta-learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from dsbp_jax import MatrixView
from dsbp_jax.tracking import Eigenspace


def array(x):
    """In the default dtype, which `jax.enable_x64` moves."""
    return jnp.asarray(x, float)


def labelled(basis, side="input"):
    """A solved eigenspace of these numbers."""
    view = MatrixView((0,), (1,))
    return Eigenspace(basis, jnp.array(True), view, side, "activation")


def normal(*shape, seed=0):
    """Standard normal entries."""
    return array(np.random.default_rng(seed).normal(size=shape))


def mlp(d_in=2, width=5, d_out=1):
    """Params of a network with one hidden layer."""
    body, head = normal(d_in, width), normal(width, d_out, seed=1)
    return {"body": {"kernel": body}, "head": {"kernel": head / np.sqrt(width)}}


def loss_fn(params, batch):
    """The network's squared error."""
    x, y = batch
    hidden = jnp.tanh(x @ params["body"]["kernel"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def cut(x, y, support):
    """Support and query sets."""
    parts = ((x[:, :support], y[:, :support]), (x[:, support:], y[:, support:]))
    return jax.tree.map(array, parts)


def sines(number=2, support=4, query=6, seed=0):
    """The sine waves of Finn et al.: amplitude and phase are the task's."""
    draw = np.random.default_rng(seed).uniform
    amplitude = draw(0.1, 5.0, (number, 1, 1))
    phase = draw(0, np.pi, (number, 1, 1))
    x = draw(-5.0, 5.0, (number, support + query, 1))
    y = amplitude * np.sin(x - phase)
    return cut(np.concatenate([x, np.ones_like(x)], axis=-1), y, support)


def decaying(number=3, examples=12, d_in=6, d_out=2, seed=0):
    """Regressions on inputs whose covariance has a decaying spectrum."""
    draw = np.random.default_rng(seed).normal
    turn = np.linalg.qr(draw(size=(number, d_in, d_in)))[0]
    x = draw(size=(number, 2 * examples, d_in)) * (3 * 0.4 ** np.arange(d_in)) @ turn
    return cut(x, np.sin(x @ draw(size=(number, d_in, d_out))), examples)


def task(tasks, index):
    """One of many tasks."""
    return jax.tree.map(lambda leaf: leaf[index], tasks)


def step_by_step(loss_fn, inner, num_steps, needs=()):
    """`adapt` without a loop; `needs` names what the optimizer takes beside params."""

    def adapt(params, support):
        state = inner.init(params)
        for _ in range(num_steps):
            value, grads = jax.value_and_grad(loss_fn)(params, support)
            extra = {
                "value": value,
                "grad": grads,
                "value_fn": lambda params: loss_fn(params, support),
                "grad_fn": lambda params, _: jax.grad(loss_fn)(params, support),
            }
            extra = {name: extra[name] for name in needs}
            updates, state = inner.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params

    return adapt


def unrolled(loss_fn, inner, num_steps):
    """The meta-loss, with its steps one by one."""
    adapt = step_by_step(loss_fn, inner, num_steps)
    task_loss = lambda params, support, query: loss_fn(adapt(params, support), query)
    over_tasks = jax.vmap(task_loss, in_axes=(None, 0, 0))
    return lambda params, tasks: over_tasks(params, *tasks).mean()


def finite_differences(function, params, step=1e-5):
    """Central differences of order four, of a function of a tree."""
    flat, unravel = ravel_pytree(params)
    steps = step * jnp.eye(flat.size)
    moved = jax.jit(jax.vmap(lambda h: function(unravel(flat + h))))
    near, far = (moved(n * steps) - moved(-n * steps) for n in (1, 2))
    return unravel((8 * near - far) / (12 * step))


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """Trees agree."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        actual,
        expected,
    )


def equal(actual, expected):
    """Trees agree bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def compiled(function, *args):
    """Its program, which tells of FLOPs and memory."""
    return jax.jit(function).lower(*args).compile()


def flops(function, *args):
    """Of one device's compiled program."""
    return compiled(function, *args).cost_analysis()["flops"]


class ConvNet(nnx.Module):
    """A convolution, batch statistics and a head."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (2, 2), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def conv_net():
    """Its loss, params and tasks."""
    model = ConvNet(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch):
        x, y = batch
        logits = nnx.merge(graph, params, rest, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    half = lambda seed: (
        normal(3, 4, 5, 5, 2, seed=seed),
        jnp.array([[0, 1, 1, 0]] * 3),
    )
    return loss_fn, params, (half(0), half(1))
