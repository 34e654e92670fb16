"""Contenders: each builds, trains, is compiled once, and is told by a text."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimizers
from experiments.config import ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import NAMED, OPTIMIZERS, Contender, kernels, msam
from experiments.optimizers.published import AdamW, Momentum, Sgd
from experiments.optimizers.spectral import Dsbp
from experiments.study import loop
from experiments.study.config import from_json, to_json
from experiments.tasks.images import ImageTask
from tests.marks import quick


def make(text):
    """A small task of a contender, and its config: 18 steps on digits."""
    config = ImageConfig(
        model=ModelConfig("mlp", {"hidden": (16,)}),
        optimizer=Contender.parse(text),
        probe=ProbeConfig(0),
        epochs=2,
        batch_size=128,
    )
    return ImageTask(config), config


def train(task, config):
    """The state after two epochs, and the mean loss of each."""
    state, losses = task.init(config), []
    for first in (0, 9):
        done = loop.train(task, config, state, first=first, until=first + 9)
        state = done.state
        losses.append(done.means["loss"])
    return state, losses


def ranked(name):
    """A contender with few columns, where it has some."""
    base = NAMED.get(name, (name, {}))[0]
    fields = {field.name for field in dataclasses.fields(OPTIMIZERS[base])}
    small = "rank" in fields and "rank" not in NAMED.get(name, (name, {}))[1]
    return f"{name}:rank=8" if small else name


TEXTS = [
    *map(ranked, (*OPTIMIZERS, *NAMED)),
    "dsbp_sam:rank=8,source=activation,side=both,decay=1e-5",
    "momentum:weight_decay=1e-3",
    "dsbp:rank=8,energy=0.9",
]


@pytest.mark.parametrize("text", quick(TEXTS, ("momentum", "spectral_muon", "dsbp")))
def test_the_loss_falls_and_nothing_is_compiled_twice(text):
    task, config = make(text)
    state, losses = train(task, config)
    assert losses[1] < losses[0]
    assert int(state.step) == task.length(config).steps == 18
    assert task._step._cache_size() == 1


def test_dsbp_that_keeps_everything_is_momentum():
    kept, _ = train(*make("dsbp:residual=1.0,rank=4"))
    plain, _ = train(*make("momentum"))
    for a, b in zip(
        jax.tree.leaves(kept.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_papers_rule_is_what_it_prints():
    paper = Contender.parse("dsbp_paper:rank=3").optimizer
    assert paper == Dsbp(
        rank=3, source="activation", residual=0.0, momentum=0.0, decay=1e-4
    )


def test_msam_is_momentum_at_perturbed_weights():
    """Against a loop that keeps weights and perturbation apart."""
    curvature = jnp.array([1.0, 4.0])
    gradient = lambda w: curvature * w
    tx = msam.msam(lambda step: 0.1 / (1 + step), momentum=0.8, rho=0.3)
    params = {"w": jnp.array([1.0, -2.0])}
    state = tx.init(params)
    w, v, ahead = params["w"], jnp.zeros(2), jnp.zeros(2)
    for step in range(4):
        grads = {"w": gradient(params["w"])}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        v = 0.8 * v + gradient(w + ahead)
        w = w - 0.1 / (1 + step) * v
        ahead = 0.3 * v / jnp.linalg.norm(v)
    np.testing.assert_allclose(params["w"], w + ahead, rtol=1e-5)
    np.testing.assert_allclose(msam.settled((state,), params)["w"], w, rtol=1e-5)


def test_msam_is_evaluated_without_its_perturbation():
    task, config = make("msam:rho=0.5")
    state, _ = train(task, config)
    off = jax.tree.map(jnp.subtract, state.params, task.params(state))
    assert float(optax.tree.norm(off)) == pytest.approx(0.5, rel=1e-4)


def test_sam_costs_two_evaluations():
    twice = {n for n, kind in OPTIMIZERS.items() if kind().evaluations == 2}
    assert twice == {"sam", "spectral_sam", "eigen_sam", "dsbp_sam"}


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("dsbp:source=gradient", ()),
        ("momentum", ()),
        ("dsbp:source=activation", ("outputs",)),
        ("dsbp:source=activation,side=input", ("inputs",)),
        ("dsbp_sam:source=activation,side=both", ("inputs", "outputs")),
        ("spectral_sam:source=activation", ("outputs",)),
        ("activation_whitening", ("inputs",)),
    ],
)
def test_activations_are_captured_where_they_are_used(text, sides):
    assert Contender.parse(text).optimizer.activations == sides


@pytest.mark.parametrize(
    "text",
    [
        "dsbp",
        "dsbp:learning_rate=0.2,rank=8",
        "spectra:rank=4",
        "adam+coordinates:b2=0.95,rank=32,tracking=4",
        "momentum+spectral:catch_up_every=4",
        "frozen_muon",
        "galore:refresh_every=200",
        "optax.lion:learning_rate=0.01,b1=0.8",
        "optax.contrib.muon+coordinates:weight_decay=0.1,beta=0.9,rank=8",
    ],
)
def test_a_text_is_read_and_written(text):
    contender = Contender.parse(text)
    assert contender.text == text
    assert Contender.parse(contender.text) == contender
    assert from_json(Contender, to_json(contender)) == contender
    assert hash(contender) == hash(Contender.parse(text))


def test_an_option_of_both_goes_to_both():
    both = Contender.parse("dsbp+spectral:rank=8,refresh_every=4")
    assert (both.optimizer.rank, both.gradients.rank) == (8, 8)
    assert (both.optimizer.refresh_every, both.gradients.refresh_every) == (4, 4)
    assert Contender.parse("adam+plain") == Contender.parse("adam")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adm", "optimizer='adm'; accepted are sgd, .* \\(nearest: adam\\)"),
        ("adam+magic", "gradients of adam\\+magic='magic'; accepted are plain"),
        ("dsbp:rnk=3", "option of dsbp='rnk'; accepted are .*\\(nearest: rank\\)"),
        ("dsbp:rank", "accepted after : are words OPTION=VALUE"),
        ("dsbp:rank=0", "optimizer='dsbp:rank=0': rank=0; accepted are"),
        ("dsbp:num_blocks=1", "num_blocks=1; accepted are"),
        ("dsbp:residual=1.5", "residual=1.5; accepted are values from 0 to 1"),
        ("dsbp:residual=most", "residual='most'; accepted are numbers"),
        ("dsbp:residual=None", "residual=None; accepted are numbers"),
        ("dsbp:side=left", "side='left'; accepted are output, input, both"),
        ("adam:learning_rate=nan", "learning_rate='nan'; accepted are numbers"),
        ("adam:learning_rate=1e999", "learning_rate=inf; accepted are positive"),
        ("adam:weight_decay=1e999", "weight_decay=inf"),
        ("sam:rho=-1", "rho=-1; accepted are values of 0 or more"),
        ("muon:decays_all=1", "decays_all=1; accepted are True and False"),
        ("optax.lions", "optimizer='optax.lions'; accepted are dotted names of func"),
        ("optx.lion", "optimizer='optx.lion'; .* No module named 'optx'"),
        ("optax.clip", "accepted are functions of a learning_rate, not of max_delta"),
        ("optax.lbfgs", "optimizer='optax.lbfgs': accepted is a function that makes"),
        ("optax.lion:b3=1", "option of optax.lion='b3'; accepted are learning_rate"),
        ("optax.lion:b1=most", "optimizer='optax.lion:b1=most': accepted is"),
        ("optax.lion:weight_decay=-1", "weight_decay=-1; accepted are values of 0"),
    ],
)
def test_what_is_wrong_in_a_text_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        Contender.parse(text)


def test_an_imported_optimizer_is_the_function():
    mine = Contender.parse("optax.lion:b1=0.8,weight_decay=0.1,schedule=constant")
    ours = optimizers.build(mine, 10)
    theirs = optax.lion(
        optimizers.learning_rate_schedule(mine.optimizer, 10, 1e-3),
        b1=0.8,
        weight_decay=0.1,
        mask=kernels,
    )
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    grads = jax.tree.map(
        lambda leaf: 0.1 + jnp.arange(leaf.size * 1.0).reshape(leaf.shape), params
    )
    steps = [tx.update(grads, tx.init(params), params)[0] for tx in (ours, theirs)]
    chex.assert_trees_all_close(*steps)


def test_an_imported_optimizer_has_its_own_defaults():
    prodigy, lion = (
        Contender.parse(name).optimizer
        for name in ("optax.contrib.prodigy", "optax.lion")
    )
    assert (prodigy.learning_rate, lion.learning_rate) == (1.0, 1e-3)
    assert (prodigy.weight_decay, lion.weight_decay) == (0.0, 1e-3)


def test_points_of_a_search_go_by_product():
    base = Contender.parse("adamw:learning_rate=0.01")
    assert base.at(1, None).optimizer == AdamW(learning_rate=0.03)
    moved = base.at(-1, 2).optimizer
    assert moved.learning_rate == pytest.approx(0.00333)
    assert moved.learning_rate * moved.weight_decay == pytest.approx(25e-4, rel=1e-2)


@pytest.mark.parametrize("num_steps", [100, jnp.int32(100)])
def test_the_schedule_rises_and_falls(num_steps):
    schedule = optimizers.learning_rate_schedule(Sgd(warmup=0.1), num_steps, 2.0)
    values = np.array([schedule(step) for step in range(100)])
    rise = optax.linear_schedule(1 / 11, 1.0, 10)
    fall = optax.cosine_decay_schedule(1.0, 90)
    expected = [2 * (rise(s) if s < 10 else fall(s - 10)) for s in range(100)]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    constant = Sgd(warmup=0.0, schedule="constant")
    schedule = optimizers.learning_rate_schedule(constant, num_steps, 2.0)
    assert float(schedule(0)) == float(schedule(99)) == 2.0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_schedules_of_very_short_runs(num_steps, warmup):
    schedule = optimizers.learning_rate_schedule(Sgd(warmup=warmup), num_steps, 1.0)
    values = [float(schedule(step)) for step in range(num_steps)]
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize("name", ["momentum", "adamw", "muon", "galore", "dsbp"])
def test_biases_do_not_decay(name):
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    rank = ",rank=2" if name in ("galore", "dsbp") else ""
    text = f"{name}:learning_rate=0.1,weight_decay=0.5,warmup=0.0{rank}"
    optimizer = optimizers.build(Contender.parse(text), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["bias"], params["bias"])
    assert np.all(new["kernel"] < params["kernel"])


def test_layout_and_roles_are_read_off_the_model():
    uses = make("dsbp")[0].classifier.uses()
    assert set(uses.layout) == {"layers/0/kernel", "head/kernel"}
    kernels = {path: uses.roles[path] for path in uses.layout}
    assert kernels == {"layers/0/kernel": "first", "head/kernel": "head"}


def test_defaults_of_a_subclass_are_its_own():
    assert (
        OPTIMIZERS["spectral_sam"]().learning_rate == Momentum().learning_rate == 0.05
    )


def test_a_function_keeps_its_own_defaults_where_names_are_the_same(monkeypatch):
    seen = []

    def tuned(learning_rate, warmup=100, schedule="mine"):
        seen.append((warmup, schedule))
        return optax.sgd(learning_rate)

    monkeypatch.setattr(optax, "tuned", tuned, raising=False)
    optimizers.Contender.parse("optax.tuned:warmup=0.2")
    assert seen == [(100, "mine")]


def test_options_without_a_hash_are_refused():
    with pytest.raises(ValueError, match="accepted are numbers, text, tuples and None"):
        optimizers.Contender.parse("optax.lion:b1=[1]")
