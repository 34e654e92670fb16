"""The table of optimizers: each builds, trains, and is compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import data, optimizers
from experiments.config import Config, ModelConfig
from experiments.loop import make_trainer, train_epoch
from experiments.optimizers import OPTIMIZERS, OptimizerConfig


def trainer_of(optimizer, **fields):
    config = Config(
        model=ModelConfig("mlp", {"hidden": (16,)}),
        optimizer=optimizer,
        epochs=2,
        batch_size=128,
        **fields,
    )
    return make_trainer(data.load("digits"), config)


def train(trainer, peak=None):
    peak = trainer.config.optimizer.peak if peak is None else peak
    state, losses = trainer.init(0), []
    for epoch in range(2):
        state, metrics = train_epoch(trainer, state, seed=0, epoch=epoch, peak=peak)
        losses.append(metrics["loss"])
    return state, losses


CONFIGS = {
    **{name: OptimizerConfig(name, rank=8) for name in OPTIMIZERS},
    "dsbp_sam": OptimizerConfig(
        "dsbp_sam", rank=8, source="activation", side="both", decay=1e-5
    ),
    "decayed momentum": OptimizerConfig("momentum", weight_decay=1e-3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_falls_and_nothing_is_compiled_twice(name):
    trainer = trainer_of(CONFIGS[name])
    state, losses = train(trainer)
    assert losses[1] < losses[0]
    assert int(state.step) == trainer.num_steps
    assert trainer._step._cache_size() == 1


def test_dsbp_that_keeps_everything_is_momentum():
    kept, _ = train(trainer_of(OptimizerConfig("dsbp", 0.05, residual=1.0, rank=4)))
    plain, _ = train(trainer_of(OptimizerConfig("momentum", 0.05)))
    for a, b in zip(
        jax.tree.leaves(kept.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_learning_rates_share_a_compiled_step_and_differ():
    trainer = trainer_of(OptimizerConfig("momentum"))
    _, slow = train(trainer, peak=1e-3)
    _, fast = train(trainer, peak=1e-1)
    assert fast[1] < slow[1]
    assert trainer._step._cache_size() == 1


def test_sam_costs_two_evaluations():
    costs = {name: entry.evaluations for name, entry in OPTIMIZERS.items()}
    twice = {name for name, cost in costs.items() if cost == 2}
    assert twice == {"sam", "spectral_sam", "eigen_sam", "dsbp_sam"}


@pytest.mark.parametrize(
    ("config", "sides"),
    [
        (OptimizerConfig("dsbp", source="gradient"), ()),
        (OptimizerConfig("momentum", source="activation"), ()),
        (OptimizerConfig("dsbp", source="activation"), ("outputs",)),
        (OptimizerConfig("dsbp", source="activation", side="input"), ("inputs",)),
        (
            OptimizerConfig("dsbp_sam", source="activation", side="both"),
            ("inputs", "outputs"),
        ),
    ],
)
def test_activations_are_captured_where_they_are_used(config, sides):
    assert config.sides == sides


def test_the_schedule_rises_and_falls():
    config = OptimizerConfig(warmup=0.1, schedule="cosine")
    schedule = optimizers.learning_rate_schedule(config, 100, 2.0)
    values = np.array([schedule(step) for step in range(100)])
    assert values.argmax() == 10
    assert values[10] == pytest.approx(2.0)
    assert 0 < values[0] < values[9] < 2.0
    assert 0 < values[99] < 0.01

    constant = OptimizerConfig(warmup=0.0, schedule="constant")
    schedule = optimizers.learning_rate_schedule(constant, 100, 2.0)
    assert float(schedule(0)) == float(schedule(99)) == 2.0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_schedules_of_very_short_runs(num_steps, warmup):
    config = OptimizerConfig(warmup=warmup)
    schedule = optimizers.learning_rate_schedule(config, num_steps, 1.0)
    values = [float(schedule(step)) for step in range(num_steps)]
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize("name", ["momentum", "adamw", "muon", "galore", "dsbp"])
def test_biases_do_not_decay(name):
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    config = OptimizerConfig(name, 0.1, weight_decay=0.5, warmup=0.0, rank=2)
    optimizer = optimizers.build(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["bias"], params["bias"])
    assert np.all(new["kernel"] < params["kernel"])


def test_layout_and_roles_are_read_off_the_model():
    uses = trainer_of(OptimizerConfig()).classifier.uses()
    assert set(uses.layout) == {"layers/0/kernel", "head/kernel"}
    kernels = {path: uses.roles[path] for path in uses.layout}
    assert kernels == {"layers/0/kernel": "first", "head/kernel": "head"}
