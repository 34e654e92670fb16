"""How tasks are run: at once, in turn, on many devices; and what are no tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg, meta
from tests.meta import models
from tests.meta.models import close, loss_fn

SGD = optax.sgd(0.1)


def linear(w, batch):
    """A regression's loss."""
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def run(task_axis):
    """Loss and gradient of five tasks."""
    learner = meta.maml(linear, SGD, 2, task_axis=task_axis)
    grad = jax.jit(jax.value_and_grad(learner.meta_loss))
    return grad(models.normal(2, 1), models.sines(5))


at_once = functools.cache(functools.partial(run, "vmap"))


@pytest.mark.parametrize("task_axis", ["auto", "map", 1, 2, 8])
def test_every_order_gives_the_same(task_axis):
    close(run(task_axis), at_once())


# Many devices


def shard(kind, params, tasks, bases=None):
    """Tasks over all devices, all else on each of them."""
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("task",), axis_types=axis_types)
    put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    return mesh, put(params, jax.P()), put(tasks, jax.P("task")), put(bases, jax.P())


BODY = dsbp_jax.Layout((("body/kernel", dsbp_jax.MatrixView((0,), (1,))),))
PROJECTION = dsbp_jax.spectral_projection(
    2, side="input", source="activation", num_blocks=3, layout=BODY
)
SPECTRAL = optax.chain(PROJECTION, SGD)


@functools.cache
def unsharded(name):
    """A function that differentiates the loss, its arguments and its result."""
    inner = SGD if name == "plain" else SPECTRAL
    vectors = jnp.linalg.qr(models.normal(6, 2))[0]
    basis = linalg.EigenBasis(vectors, jnp.ones(2), jnp.ones(()))
    bases = {"body/kernel": models.labelled(basis)} if name == "given bases" else None
    learner = meta.maml(loss_fn, inner, 2)
    grad = jax.jit(jax.value_and_grad(lambda p, t, b: learner.meta_loss(p, t, bases=b)))
    args = (models.mlp(6, 6, 4), models.decaying(8, 12, 6, 4), bases)
    return grad, args, grad(*args)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plain", "Auto"),
        ("plain", "Explicit"),
        ("given bases", "Auto"),
        ("given bases", "Explicit"),
        ("bases of the task", "Auto"),
        ("bases of the task", "Explicit"),
    ],
)
def test_sharded_tasks_agree_with_unsharded(name, kind):
    grad, args, expected = unsharded(name)
    mesh, *sharded = shard(kind, *args)
    with jax.set_mesh(mesh):
        close(grad(*sharded), expected, 1e-4, 1e-5)


def test_other_functions_on_sharded_tasks():
    params, tasks, bases = unsharded("given bases")[1]
    learner, support = meta.maml(loss_fn, SPECTRAL, 2), models.task(tasks[0], 0)

    @jax.jit
    def run(params, tasks, bases):
        return (
            learner.curve(params, tasks, bases=bases),
            learner.activations(params, tasks),
            learner.adapt(params, support, bases=bases),
        )

    expected = run(params, tasks, bases)
    mesh, *sharded = shard("Explicit", params, tasks, bases)
    with jax.set_mesh(mesh):
        close(run(*sharded), expected, 1e-4, 1e-5)


def test_each_of_eight_devices_does_an_eighth():
    params, tasks = models.normal(32, 16), models.decaying(16, 32, 32, 16)
    learner = meta.maml(linear, SGD, 2)
    grad = jax.grad(learner.meta_loss)
    whole = models.flops(grad, params, tasks)
    mesh, params, tasks, _ = shard("Auto", params, tasks)
    with jax.set_mesh(mesh):
        part = models.flops(grad, params, tasks)
    assert 0.11 < part / whole < 0.14


# Bad input


def test_bad_arguments():
    for task_axis in ("loop", 0, 2.5, None):
        with pytest.raises(
            ValueError, match=f"task_axis must be .*, got {task_axis!r}"
        ):
            meta.maml(loss_fn, SGD, 1, task_axis=task_axis)
    for make in (meta.maml, meta.reptile, functools.partial(meta.anil, head="head")):
        with pytest.raises(ValueError, match="num_steps must be an int of at least 1"):
            make(loss_fn, SGD, 0)
        with pytest.raises(ValueError, match="inner must be an optax transformation"):
            make(loss_fn, optax.sgd, 1)
        with pytest.raises(ValueError, match="loss_fn must be a function, got None"):
            make(None, SGD, 1)
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1"):
        meta.reptile(loss_fn, SGD, 1, batch_size=0)


def test_bad_tasks():
    params, (support, query) = models.mlp(), models.sines(3)
    meta_loss = meta.maml(loss_fn, SGD, 1).meta_loss
    with pytest.raises(ValueError, match=r"tasks must be a pair .*, got ArrayImpl"):
        meta_loss(params, support[0])
    with pytest.raises(ValueError, match=r"tasks must be a pair .*, got tuple"):
        meta_loss(params, (support,))
    fewer = jax.tree.map(lambda leaf: leaf[:2], query)
    with pytest.raises(ValueError, match=r"one number of tasks .* \(2, 6, 2\)"):
        meta_loss(params, (support, fewer))
    alone = (np.zeros((10, 1)), np.zeros((10, 1)))  # points and values of one task
    images = (np.zeros((10, 4, 4, 1)), np.zeros(10, int))
    for one in (alone, images):
        with pytest.raises(
            ValueError, match=r"shape \(task, example, …\).* axis of size 1"
        ):
            meta_loss(params, (one, one))
    uneven = (np.zeros((2, 6, 1)), np.zeros((2, 5, 1)))
    with pytest.raises(ValueError, match="one number of examples in each of the two"):
        meta_loss(params, (uneven, uneven))
    with pytest.raises(ValueError, match="got arrays of shape none"):
        meta_loss(params, ((), ()))


@pytest.mark.parametrize("make", [meta.maml, meta.reptile])
def test_a_loss_that_is_no_scalar(make):
    params, tasks = models.mlp(), models.sines(3)
    each = lambda params, batch: batch[0] @ params["body"]["kernel"]
    with pytest.raises(ValueError, match=r"loss_fn .* scalar"):
        make(each, SGD, 1).meta_loss(params, tasks)
