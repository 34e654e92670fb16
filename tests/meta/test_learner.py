"""Adaptation to many tasks: loss, curve, keys, and how convolutions decide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import dsbp_jax
from dsbp_jax import meta
from dsbp_jax.meta.adaptation import Adaptation, with_rates
from dsbp_jax.meta.learner import make_learner
from tests.meta import models
from tests.meta.models import close, loss_fn

SGD = optax.sgd(0.1)


# In closed form


def distance(w, x):
    return 0.5 * jnp.sum((w - x) ** 2)


RATE, STEPS = 0.5, 2
HALVING = Adaptation(loss_fn=distance, inner=optax.sgd(RATE), num_steps=STEPS)
TASKS = (
    jnp.array([[[1.0]], [[3.0]], [[-2.0]]]),
    jnp.array([[[0.0]], [[5.0]], [[1.0]]]),
)
START = jnp.array(9.0)


def halved(steps):
    """Each task's params: half of the way to its example, in each step."""
    support = TASKS[0].squeeze()
    return support + (1 - RATE) ** steps * (START - support)


@pytest.mark.parametrize("task_axis", ["auto", "vmap", "map", 2])
def test_loss_and_curve_of_tasks_in_closed_form(task_axis):
    learner = make_learner(HALVING, task_axis)
    losses = lambda steps: 0.5 * (halved(steps) - TASKS[1].squeeze()) ** 2
    close(learner.meta_loss(START, TASKS), losses(STEPS).mean())
    wanted = jnp.stack([losses(steps) for steps in (0, 1, 2)], axis=1)
    close(learner.curve(START, TASKS), wanted)
    params = jnp.stack([halved(steps) for steps in (0, 1, 2)], axis=1)
    close(learner.curve(START, TASKS, lambda w, query: w), params)
    slope = jnp.mean((1 - RATE) ** STEPS * (halved(STEPS) - TASKS[1].squeeze()))
    close(jax.grad(learner.meta_loss)(START, TASKS), slope)


def test_adapting_is_that_of_one_task_and_drops_the_rates():
    learner = make_learner(HALVING, "vmap")
    close(learner.adapt(START, TASKS[0][1]), halved(STEPS)[1])
    close(learner.adapt(with_rates(START), TASKS[0][1]), halved(STEPS)[1])


def test_another_loss_of_a_task():
    gap = lambda w, task, bases, key: w * jnp.sum(task[1])
    learner = make_learner(HALVING, "vmap", task_loss=gap)
    close(learner.meta_loss(START, TASKS), START * TASKS[1].mean())


def test_params_are_checked_before_anything_runs():
    def check(params):
        raise LookupError

    learner = make_learner(HALVING, "vmap", check)
    with pytest.raises(LookupError):
        learner.adapt(START, TASKS[0][0])
    for run in (learner.meta_loss, learner.curve):
        with pytest.raises(LookupError):
            run(START, TASKS)


# Activations of all tasks


def test_rows_of_all_tasks_are_pooled_in_each_layer():
    def stack_loss(params, x):
        return jnp.mean(lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0] ** 2)

    params, x = {"w": models.normal(2, 3, 3)}, models.normal(4, 5, 3, seed=1)
    adaptation = Adaptation(loss_fn=stack_loss, inner=SGD, num_steps=1)
    learner = make_learner(adaptation, "vmap")
    found = learner.activations(params, (x, x[:, :2]))
    captured = dsbp_jax.capture_activations(stack_loss)
    alone = [captured(params, one)[1]["w"] for one in x]
    for side in ("inputs", "outputs"):
        rows = np.concatenate([getattr(layer, side) for layer in alone], axis=-2)
        assert rows.shape == (2, 20, 3)
        close(getattr(found["w"], side), jnp.asarray(rows))
    np.testing.assert_array_equal(found["w"].count, [20, 20])
    assert found["w"].view == alone[0].view
    assert list(learner.activations(with_rates(params), (x, x))) == ["params/w"]


# A curve and a key for each task


def test_curve():
    params, (support, query) = models.mlp(), models.sines(3)
    learner = meta.maml(loss_fn, SGD, 4)
    curve = jax.jit(learner.curve)(params, (support, query))
    assert curve.shape == (3, 5)
    each = lambda function: jax.jit(jax.vmap(function))(support, query)
    adapted = lambda s, q: loss_fn(learner.adapt(params, s), q)
    close(curve[:, 0], each(lambda s, q: loss_fn(params, q)))
    close(curve[:, -1], each(adapted))
    metric_fn = lambda p, q: {"loss": loss_fn(p, q), "head": p["head"]["kernel"]}
    run = jax.jit(functools.partial(learner.curve, metric_fn=metric_fn))
    measured = run(params, (support, query))
    close(measured["loss"], curve)
    assert measured["head"].shape == (3, 5, 5, 1)


def test_every_task_and_step_has_a_key_of_its_own():
    """The loss is linear: its gradient, and what a step moves by, is the draw."""
    keyed = lambda w, batch, *, key: w * jax.random.normal(key)
    learner = meta.maml(keyed, optax.sgd(1.0), 3)
    w, tasks = jnp.zeros(()), (jnp.zeros((2, 1, 1)), jnp.zeros((2, 1, 1)))
    curve = jax.jit(lambda key: learner.curve(w, tasks, lambda w, _: w, key=key))
    draws = lambda seed: -np.diff(curve(jax.random.key(seed)))
    first = draws(0)
    assert len(np.unique(first.round(5))) == first.size
    np.testing.assert_array_equal(draws(0), first)
    assert not np.isin(draws(1).round(5), first.round(5)).any()

    one = jax.tree.map(lambda leaf: leaf[:1], tasks)
    both = lambda key: (
        jax.grad(learner.meta_loss)(w, one, key=key),
        learner.curve(w, one, lambda w, _: w, key=key),
    )
    in_the_query, ends = jax.jit(both)(jax.random.key(0))
    assert not np.isclose(in_the_query, -np.diff(ends)).any()
    with pytest.raises(TypeError, match="key"):
        learner.meta_loss(w, tasks)


# Convolutions


def convolution(**options):
    """A model of one convolution, its params and tasks."""
    groups = options.get("feature_group_count", 1)

    def conv_loss(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        window = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))}
        y = jax.lax.conv_general_dilated(
            x, w, dimension_numbers=numbers, **window, **options
        )
        return jnp.mean((y - 1) ** 2)

    x = models.normal(3, 2, 4, 4, 2)
    return conv_loss, models.normal(2, 2, 2 // groups, 2), (x, x)


PROBLEMS = {
    "vmap": {
        "mlp": lambda: (loss_fn, models.mlp(), models.sines(3)),
        "nnx": models.conv_net,
        "strided": lambda: convolution(rhs_dilation=(2, 2)),
    },
    "map": {
        "grouped": lambda: convolution(feature_group_count=2),
        "transposed": lambda: convolution(lhs_dilation=(2, 2)),
    },
}


@pytest.mark.parametrize(
    ("expected", "name"), [(how, name) for how in PROBLEMS for name in PROBLEMS[how]]
)
def test_auto_is_chosen_by_the_convolutions_on_a_cpu(expected, name):
    conv_loss, params, tasks = PROBLEMS[expected][name]()
    assert len(jax.tree.leaves(tasks)[0]) == 3
    learner = meta.maml(conv_loss, SGD, 1)
    program = str(jax.make_jaxpr(jax.grad(learner.meta_loss))(params, tasks))
    # A loop over the three tasks, or none; that over the steps has one.
    assert ("length=3" in program) == (expected == "map")
