"""Steps on one task, against what they come to in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsbp_jax import meta
from dsbp_jax.meta.adaptation import (
    Adaptation,
    key_argument,
    plain_params,
    with_rates,
)
from tests.meta import models
from tests.meta.models import close, equal, loss_fn

SGD = optax.sgd(0.05)
RATE = 0.25
TARGET = jnp.array([[1.0, -2.0, 3.0]])
START = jnp.array([4.0, 0.0, 1.0])


def distance(w, x):
    """Each step of descent leaves `1 − RATE` of the way to the target."""
    return 0.5 * jnp.sum((w - x) ** 2)


def tree_distance(params, x):
    return sum(distance(leaf, x) for leaf in jax.tree.leaves(params))


def left_after(steps, start=START, rate=RATE):
    return TARGET[0] + (1 - rate) ** steps * (start - TARGET[0])


ADAPTATION = Adaptation(loss_fn=distance, inner=optax.sgd(RATE), num_steps=3)


# The steps


def test_steps_and_what_is_noted_after_each():
    end, noted = ADAPTATION.run(START, TARGET, after=lambda w: {"w": w})
    close(end, left_after(3))
    close(noted, {"w": jnp.stack([left_after(k) for k in (1, 2, 3)])})


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_derivative_by_the_start(first_order, checkpoint):
    """Through all steps, or with the updates as constants."""
    adaptation = dataclasses.replace(
        ADAPTATION, first_order=first_order, checkpoint=checkpoint
    )
    slope = jax.jacrev(lambda w: adaptation.run(w, TARGET)[0])(START)
    close(slope, jnp.eye(3) * (1.0 if first_order else (1 - RATE) ** 3))


def test_examples_are_taken_in_turn():
    """The loss is linear, and a step moves by the sum of its examples."""
    adaptation = Adaptation(
        loss_fn=lambda w, x: w * jnp.sum(x),
        inner=optax.sgd(1.0),
        num_steps=4,
        batch_size=2,
    )
    support = 10.0 ** jnp.arange(5.0)
    _, noted = adaptation.run(jnp.zeros(()), support, after=lambda w: w)
    moved = -np.diff(np.asarray(noted), prepend=0)
    wanted = [support[jnp.array(two)].sum() for two in ([0, 1], [2, 3], [4, 0], [1, 2])]
    np.testing.assert_allclose(moved, wanted)


def test_every_step_has_the_key_of_its_number():
    draw = lambda w, x, *, key: w * jax.random.normal(key)
    adaptation = Adaptation(loss_fn=draw, inner=optax.sgd(1.0), num_steps=3)
    key = jax.random.key(5)
    _, noted = adaptation.run(
        jnp.zeros(()), jnp.zeros((1, 1)), key=key, after=lambda w: w
    )
    draws = [jax.random.normal(key_argument(key, step)["key"]) for step in range(3)]
    assert len({float(one) for one in draws}) == 3
    close(noted, -jnp.cumsum(jnp.stack(draws)))
    assert key_argument(None, 0) == {}


# Leaves that do not move


def of(path):
    return path.startswith("head")


PARAMS = {"body": START, "head": {"kernel": 2 * START}}


def test_only_some_leaves_move():
    adaptation = dataclasses.replace(ADAPTATION, loss_fn=tree_distance, moves=of)
    end, noted = adaptation.run(PARAMS, TARGET, after=lambda params: params)
    close(end, {"body": START, "head": {"kernel": left_after(3, 2 * START)}})
    equal(noted["body"], jnp.stack([START] * 3))
    # Those that stay are the start itself to a derivative.
    total = lambda p: jnp.sum(adaptation.run(p, TARGET)[0]["body"])
    slope = jax.grad(total)(PARAMS)
    equal(slope, {"body": jnp.ones(3), "head": {"kernel": jnp.zeros(3)}})


@pytest.mark.parametrize("moves", [None, of, lambda path: True, lambda path: False])
def test_split_leaves_are_put_back(moves):
    moving, merge = dataclasses.replace(ADAPTATION, moves=moves).split(PARAMS)
    equal(merge(moving), PARAMS)
    if moves is not None:
        assert (moving["body"] is None) == (not moves("body"))
        assert (moving["head"]["kernel"] is None) == (not moves("head/kernel"))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, moving)
    stay = moves is not None and not moves("body")
    equal(merge(doubled)["body"], START if stay else 2 * START)


# Rates


def test_a_rate_multiplies_the_updates_of_its_leaf():
    given = with_rates(PARAMS, 0.5)
    assert plain_params(given) is PARAMS
    assert plain_params(PARAMS) is PARAMS
    for rate in jax.tree.leaves(given.rates):
        assert (rate.shape, rate.dtype, rate) == ((), jnp.float32, 0.5)
    rates = {"body": jnp.array([0.0, 1.0, 2.0]), "head": {"kernel": jnp.array(0.4)}}
    adaptation = dataclasses.replace(ADAPTATION, loss_fn=tree_distance)
    end, _ = adaptation.run(given._replace(rates=rates), TARGET)
    wanted = {
        "body": left_after(3, rate=RATE * rates["body"]),
        "head": {"kernel": left_after(3, 2 * START, rate=RATE * 0.4)},
    }
    close(end, wanted)


def test_updates_of_first_order_are_constants_to_all():
    params, tasks = models.mlp(), models.sines()

    def meta_loss(rate):
        learner = meta.maml(loss_fn, optax.sgd(rate), 2, first_order=True)
        return learner.meta_loss(params, tasks)

    assert jax.jit(jax.grad(meta_loss))(jnp.array(0.1)) == 0


def test_checkpoint_saves_memory_only():
    params = models.mlp(4, 64)
    tasks = [(models.normal(2, 128, 4, seed=s), jnp.ones((2, 128, 1))) for s in (0, 1)]

    def run(num_steps, checkpoint):
        learner = meta.maml(loss_fn, SGD, num_steps, checkpoint=checkpoint)
        program = models.compiled(jax.grad(learner.meta_loss), params, tasks)
        memory = program.memory_analysis().temp_size_in_bytes
        return program(params, tasks), memory

    (plain, few), (_, many) = run(2, False), run(16, False)
    (again, few_again), (_, many_again) = run(2, True), run(16, True)
    close(again, plain)
    assert many_again - few_again < 0.2 * (many - few)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rates_scale_updates_of_any_dtype(dtype):
    double = lambda w, x: jnp.sum(w * x)
    learner = meta.maml(double, optax.sgd(1.0), 2)
    w, x = jnp.ones((), dtype), jnp.ones((1,), dtype)
    adapted = learner.adapt(meta.with_rates(w, 0.25), x)
    assert adapted == 0.5
    assert adapted.dtype == dtype
    # A rate that is none of bfloat16's.
    w, rate = jnp.full((), 0.77, dtype), jnp.float32(1.003)
    adapted = meta.maml(double, optax.sgd(1.0), 1).adapt(meta.WithRates(w, rate), x * 3)
    assert adapted == w - (rate * 3).astype(dtype)
