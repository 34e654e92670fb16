"""Sources of gradients: each trains, is compiled once, and gives back parameters."""

import jax
import numpy as np
import pytest

from experiments import gradients, optimizers, runs, train
from experiments.config import Config
from experiments.optimizers import OptimizerConfig
from tests.experiments.small_runs import SMALL, records
from tests.experiments.test_optimizers import train as train_two_epochs, trainer_of
from tests.experiments.test_resume import final_state


def config(name, backprop, **fields):
    return OptimizerConfig(name, rank=8, refresh_every=4, backprop=backprop, **fields)


CONFIGS = {
    "adam+coordinates": config("adam", "coordinates"),
    "sam+coordinates": config("sam", "coordinates", tracking=0),
    "adamw+coordinates": config("adamw", "coordinates", weight_decay=0.1),
    "momentum+spectral": config("momentum", "spectral", random=2, catch_up_every=3),
    "sam+spectral": config("sam", "spectral", tracking=3),
    "dsbp+spectral": config("dsbp", "spectral", source="activation"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_falls_and_nothing_is_compiled_twice(name):
    trainer = trainer_of(CONFIGS[name])
    state, losses = train_two_epochs(trainer)
    assert losses[1] < losses[0]
    assert trainer._step._cache_size() == 1
    assert trainer._refresh._cache_size() <= 1
    assert trainer._catch_up._cache_size() == bool(trainer.catch_up_every)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    plain, _ = trainer.classifier.init(0)
    assert shapes(trainer.params(state)) == shapes(plain)
    assert trainer.evaluate(state, trainer.classifier.dataset.test)["accuracy"] > 0


def test_folds_decay_kernels_with_the_learning_rate():
    """At a rate too small to learn, what is left is the decay of the kernels."""
    rate, decay = 1e-6, 1e4
    trainer = trainer_of(config("adamw", "coordinates", weight_decay=decay))
    first, _ = trainer.classifier.init(0)
    state, _ = train_two_epochs(trainer, peak=rate)
    schedule = optimizers.learning_rate_schedule(
        trainer.config.optimizer, trainer.num_steps, rate
    )
    folded = (trainer.num_steps - 1) // 4 * 4
    total = sum(float(schedule(step)) for step in range(folded)) / rate
    kernel = trainer.params(state)["layers"][0]["kernel"]
    wanted = (1 - rate * decay) ** total * first["layers"][0]["kernel"]
    np.testing.assert_allclose(kernel, wanted, atol=1e-4)


def test_interrupted_coordinates_go_on_as_they_were(tmp_path, monkeypatch):
    options = [*SMALL, "--optimizer.name", "adam", "--optimizer.backprop"]
    options += ["coordinates", "--optimizer.refresh-every", "3"]
    train.main([*options, "--out", str(tmp_path / "whole")])
    out = ["--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        logged, log = [], runs.Run.log

        def log_then_stop(self, record):
            log(self, record)
            logged.append(record)
            if len(logged) == 2:
                raise KeyboardInterrupt

        patch.setattr(runs.Run, "log", log_then_stop)
        with pytest.raises(SystemExit):
            train.main([*options, *out])
    train.main([*options, *out, "--resume"])
    whole, cut = (
        tmp_path / name / "digits-adam+coordinates-seed0" for name in ("whole", "cut")
    )
    ours, theirs = final_state(cut), final_state(whole)
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    assert records(cut)[-1]["test"] == records(whole)[-1]["test"]


def test_a_refresh_sees_a_part_of_a_batch_but_enough_for_its_columns():
    small = OptimizerConfig(rank=64)
    assert gradients.rows_of_refresh(small, 2048) == 512
    assert gradients.rows_of_refresh(small, 256) == 128
    assert gradients.rows_of_refresh(small, 100) == 100


def test_names_say_where_gradients_come_from():
    start = Config().optimizer
    named = optimizers.named(start, "adam+coordinates")
    assert (named.name, named.backprop, named.label) == (
        "adam",
        "coordinates",
        "adam+coordinates",
    )
    assert optimizers.named(named, "momentum").backprop == "coordinates"
    assert optimizers.named(named, "momentum+plain").label == "momentum"
    assert optimizers.named(start, "dsbp_sam").name == "dsbp_sam"
    with pytest.raises(ValueError, match="optimizers='adam\\+magic'; accepted are"):
        optimizers.named(start, "adam+magic")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "dsbp", "backprop": "coordinates"},
            "accepted are sgd, momentum, sam",
        ),
        ({"backprop": "sideways"}, "optimizer.backprop='sideways'"),
        ({"tracking": 99}, "optimizer.tracking=99; accepted are values from 0 to 64"),
        ({"random": -1}, "optimizer.random=-1"),
        ({"catch_up_every": 1}, "optimizer.catch_up_every=1"),
    ],
)
def test_what_does_not_fit_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    ("name", "backprop"),
    [
        ("eigen_sam", "spectral"),
        ("eigen_sam", "coordinates"),
        ("spectral_sam", "coordinates"),
        ("subspace_adam", "coordinates"),
    ],
)
def test_what_follows_directions_of_its_own_is_refused(name, backprop):
    with pytest.raises(ValueError, match=r"accepted are sgd, .* of their own"):
        config(name, backprop)
