"""MAML and its relatives against plain loops, definitions and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import meta
from tests.meta import models
from tests.meta.models import close, equal, loss_fn, task

SGD = optax.sgd(0.05)
MOMENTUM = optax.sgd(0.05, momentum=0.9)
ADAM = optax.adam(0.05, eps=1e-3)
ADAMW = optax.adamw(0.05, weight_decay=0.5)


@pytest.fixture
def wide():
    """float64, in which rounding leaves differences of derivatives exact."""
    with jax.enable_x64(True):
        yield


def value_and_grad(meta_loss, params, tasks):
    return jax.jit(jax.value_and_grad(meta_loss))(params, tasks)


def at_the_adapted(learner, params, tasks, wrt=lambda grads, *_: grads):
    """FOMAML's gradient by its definition."""

    def one(support, query):
        adapted = learner.adapt(params, support)
        return wrt(jax.grad(loss_fn)(adapted, query), adapted)

    grads = jax.jit(jax.vmap(one))(*tasks)
    return jax.tree.map(lambda leaf: leaf.mean(0), grads)


@pytest.mark.parametrize("inner", [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])
@pytest.mark.usefixtures("wide")
@pytest.mark.promotes  # optax.adam
def test_the_meta_gradient(inner):
    params, tasks = models.mlp(width=3), models.sines()
    meta_loss = meta.maml(loss_fn, inner, 2).meta_loss
    value, grads = value_and_grad(meta_loss, params, tasks)
    reference = models.unrolled(loss_fn, inner, 2)
    wanted_value, wanted = value_and_grad(reference, params, tasks)
    close(value, wanted_value, 1e-12)
    close(grads, wanted, 1e-9, 1e-9)
    differences = models.finite_differences(lambda p: meta_loss(p, tasks), params)
    close(grads, differences, 1e-6, 1e-8)


@pytest.mark.parametrize("inner", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.promotes  # optax.adam
def test_first_order_is_the_gradient_at_the_adapted_params(inner):
    params, tasks = models.mlp(), models.sines()
    learner = meta.maml(loss_fn, inner, 3, first_order=True)
    program = models.compiled(jax.grad(learner.meta_loss), params, tasks)
    close(program(params, tasks), at_the_adapted(learner, params, tasks))
    if inner is SGD:
        second = jax.grad(meta.maml(loss_fn, inner, 3).meta_loss)
        limit = 0.8 * models.flops(second, params, tasks)
        assert program.cost_analysis()["flops"] < limit


# ANIL


@pytest.mark.parametrize("head", ["head", ("head/kernel",)])
@pytest.mark.promotes  # optax.adam
def test_anil_adapts_the_head_only(head):
    params, tasks = models.mlp(), models.sines()
    inner = ADAMW
    learner = meta.anil(loss_fn, inner, 3, head=head)
    adapted = learner.adapt(params, task(tasks[0], 0))
    equal(adapted["body"], params["body"])
    assert np.all(adapted["head"]["kernel"] != params["head"]["kernel"])
    split = {"head": inner, "body": optax.set_to_zero()}
    labels = {name: dict.fromkeys(params[name], name) for name in params}
    reference = models.unrolled(loss_fn, optax.partition(split, labels), 3)
    actual = value_and_grad(learner.meta_loss, params, tasks)
    close(actual, value_and_grad(reference, params, tasks), 1e-4, 1e-5)


def test_anil_of_first_order_is_the_gradient_at_the_adapted_params():
    params, tasks = models.mlp(), models.sines()
    inner = SGD
    learner = meta.anil(loss_fn, inner, 3, head="head", first_order=True)
    actual = jax.jit(jax.grad(learner.meta_loss))(params, tasks)
    close(actual, at_the_adapted(learner, params, tasks))


def test_anil_is_cheaper_and_names_the_paths():
    params, (support, _) = models.mlp(32, 32), models.decaying(1, 16, 32, 1)
    make = functools.partial(meta.anil, loss_fn, SGD, 3)
    support = task(support, 0)
    whole = meta.maml(loss_fn, SGD, 3).adapt
    part = models.flops(make(head="head").adapt, params, support)
    assert part < 0.7 * models.flops(whole, params, support)
    with pytest.raises(ValueError, match=r"body/kernel, head/kernel\), got 'tail'"):
        make(head=("head", "tail")).adapt(params, support)
    for none in ((), None, 5):
        with pytest.raises(ValueError, match="head must be canonical paths of leaves"):
            make(head=none)


# Reptile


def test_reptile_goes_round_the_examples():
    mean_loss = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
    learner = meta.reptile(mean_loss, optax.sgd(0.5), 4, batch_size=2)
    support, query = jnp.array([[1.0, 2, 3], [6, 1, 5]]), jnp.array([[4.0, 5], [0, 9]])
    start, ends = 1.0, []
    for examples in np.concatenate([support, query], axis=1):
        w = start
        for rows in ([0, 1], [2, 3], [4, 0], [1, 2]):
            w += 0.5 * (examples[rows].mean() - w)
        ends.append(w)
    params = jnp.array(start)
    value, grad = value_and_grad(learner.meta_loss, params, (support, query))
    assert value == pytest.approx(np.mean([0.5 * (start - w) ** 2 for w in ends]))
    assert grad == pytest.approx(start - np.mean(ends))
    outer = optax.sgd(1.0)
    updates, _ = outer.update(grad, outer.init(params))
    assert optax.apply_updates(params, updates) == pytest.approx(np.mean(ends))


@pytest.mark.promotes  # optax.adam
def test_reptile_moves_to_the_mean_of_the_adapted():
    params, (support, query) = models.mlp(), models.sines()
    inner = ADAM
    learner = meta.reptile(loss_fn, inner, 3)
    grads = jax.jit(jax.grad(learner.meta_loss))(params, (support, query))
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), support, query)
    adapt = functools.partial(meta.maml(loss_fn, inner, 3).adapt, params)
    adapted = jax.jit(jax.vmap(adapt))(joined)
    close(grads, jax.tree.map(lambda p, a: p - a.mean(0), params, adapted))
    with pytest.raises(ValueError, match="params must be without rates for reptile"):
        learner.meta_loss(meta.with_rates(params), (support, query))


# Rates


@pytest.mark.usefixtures("wide")
def test_rates_are_learned():
    params, tasks = models.mlp(width=3), models.sines()
    entries = 0.5 + abs(models.normal(2, 3, seed=2))  # one for each, or one for all
    rates = {"body": {"kernel": entries}, "head": {"kernel": jnp.array(0.7)}}
    given = meta.WithRates(params, rates)
    learner = meta.maml(loss_fn, MOMENTUM, 2)
    moved = lambda given: learner.meta_loss(given, tasks)
    expected = models.finite_differences(moved, given)
    close(jax.jit(jax.grad(learner.meta_loss))(given, tasks), expected, 1e-6, 1e-8)

    learner = meta.maml(loss_fn, MOMENTUM, 2, first_order=True)

    def by_definition(grads, adapted):
        """The updates are constants, and their sum times the rate the way gone."""
        total = lambda x, rate: x if rate.ndim else x.sum()
        along = lambda g, end, start, rate: total(g * (end - start), rate) / rate
        rates = jax.tree.map(along, grads, adapted, params, given.rates)
        return meta.WithRates(grads, rates)

    expected = at_the_adapted(learner, given, tasks, by_definition)
    close(jax.jit(jax.grad(learner.meta_loss))(given, tasks), expected, 1e-9, 1e-9)


def test_rates_of_anil():
    given, tasks = meta.with_rates(models.mlp(), 0.5), models.sines()
    make = functools.partial(meta.anil, loss_fn, head="head", num_steps=2)
    actual = make(inner=optax.sgd(0.1)).meta_loss(given, tasks)
    expected = make(inner=optax.sgd(0.05)).meta_loss(given.params, tasks)
    close(actual, expected)


# Inner optimizers and models of other kinds


SEARCH = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8))
SAM = dsbp_jax.spectral_sam(optax.sgd(0.05), 0.1, mode="full")
OPTAX_SAM = optax.contrib.sam(
    optax.sgd(0.05), optax.sgd(0.1), sync_period=2, opaque_mode=True
)
EVALUATING = {
    "search": (SEARCH, ("value", "grad", "value_fn")),
    "sam": (SAM, ("grad_fn",)),
    "optax's sam, which takes nothing else": (OPTAX_SAM, ("grad_fn",)),
}


@pytest.mark.parametrize("name", EVALUATING)
def test_inner_optimizers_that_evaluate_the_loss(name):
    inner, needs = EVALUATING[name]
    params, tasks = models.mlp(), models.sines()
    learner = meta.maml(loss_fn, inner, 2, first_order=True)
    grads = jax.jit(jax.grad(learner.meta_loss))(params, tasks)
    adapt = models.step_by_step(loss_fn, inner, 2, needs)
    reference = learner._replace(adapt=adapt)
    close(grads, at_the_adapted(reference, params, tasks), 1e-4, 1e-5)


@pytest.mark.promotes  # optax.adam
def test_an_outer_loop_compiles_once_and_learns():
    learner = meta.maml(loss_fn, SGD, 2)
    params, outer, traces = models.mlp(width=16), optax.adam(0.02), []

    @jax.jit
    def step(params, state, tasks):
        traces.append(1)
        loss, grads = jax.value_and_grad(learner.meta_loss)(params, tasks)
        updates, state = outer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, held = outer.init(params), models.sines(16, seed=100)
    before = step(params, state, held)[2]
    for seed in range(60):
        params, state, _ = step(params, state, models.sines(16, seed=seed))
    assert step(params, state, held)[2] < 0.6 * before
    assert len(traces) == 1


@pytest.mark.parametrize("make", [meta.maml, meta.reptile])
@pytest.mark.promotes  # optax.adam
def test_params_keep_their_dtype(make):
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    params, tasks = half(models.mlp()), half(models.sines())
    spectral = optax.chain(dsbp_jax.spectral_projection(2), SGD)
    for inner in (ADAM, spectral):
        learner = make(loss_fn, inner, 2)
        adapted = jax.eval_shape(learner.adapt, params, task(tasks[0], 0))
        grads = jax.eval_shape(jax.grad(learner.meta_loss), params, tasks)
        for leaf in jax.tree.leaves((adapted, grads)):
            assert leaf.dtype == jnp.bfloat16
