"""Sources of gradients: each trains, is compiled once, and gives back parameters."""

import jax
import numpy as np
import pytest

from experiments import optimizers, train
from experiments.optimizers import Contender
from experiments.optimizers.gradients import Sketch
from experiments.study import runs
from tests.experiments.small_runs import SMALL, records
from tests.experiments.test_optimizers import make, train as train_two_epochs
from tests.experiments.test_resume import final_state
from tests.marks import quick

FEW = "rank=8,refresh_every=4"
TEXTS = [
    f"adam+coordinates:{FEW}",
    f"sam+coordinates:{FEW},tracking=0",
    f"spectral_muon+coordinates:{FEW},weight_decay=0.1,random=True",
    f"momentum+spectral:{FEW},random=2,catch_up_every=3",
    f"sam+spectral:{FEW},tracking=3",
    f"dsbp+spectral:{FEW},source=activation",
    "adamw+lora:rank=8,weight_decay=0.1",
    "adamw+lora:rank=64",  # no kernel has as many dimensions
]


@pytest.mark.parametrize("text", quick(TEXTS, (TEXTS[0], TEXTS[3])))
def test_the_loss_falls_and_nothing_is_compiled_twice(text):
    task, config = make(text)
    state, losses = train_two_epochs(task, config)
    assert losses[1] < losses[0]
    assert task._step._cache_size() == 1
    assert task._refresh._cache_size() <= 1
    assert task._fold._cache_size() == task.folds
    assert task._catch_up._cache_size() == bool(task.catch_up_every)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    plain, _ = task.classifier.init(0)
    assert shapes(task.params(state)) == shapes(plain)
    assert task.evaluate(state, "test", config)["accuracy"] > 0


@pytest.mark.slow
def test_folds_decay_kernels_with_the_learning_rate():
    """At a rate too small to learn, what is left is the decay of the kernels."""
    rate, decay = 1e-6, 1e4
    text = f"adamw+coordinates:{FEW},weight_decay={decay},learning_rate={rate}"
    task, config = make(text)
    first, _ = task.classifier.init(0)
    state, _ = train_two_epochs(task, config)
    steps = task.length(config).steps
    schedule = optimizers.learning_rate_schedule(
        config.optimizer.optimizer, steps, rate
    )
    folded = steps // 4 * 4
    left = np.prod([1 - decay * float(schedule(step)) for step in range(folded)])
    kernel = task.params(state)["layers"][0]["kernel"]
    wanted = left * first["layers"][0]["kernel"]
    np.testing.assert_allclose(kernel, wanted, atol=1e-4)


@pytest.mark.slow
def test_interrupted_coordinates_go_on_as_they_were(tmp_path, monkeypatch):
    options = [*SMALL, "--optimizer", "adam+coordinates:rank=8,refresh_every=3"]
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
    assert Sketch(rank=64).rows(2048) == 512
    assert Sketch(rank=64).rows(256) == 128
    assert Sketch(rank=64).rows(100) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adam+coordinates:tracking=99",
            "tracking=99; accepted are values from 0 to 64",
        ),
        ("adam+spectral:random=-1", "random=-1"),
        ("adam+spectral:catch_up_every=1", "catch_up_every=1"),
        ("adam+coordinates:random=1", "random=1; accepted are True and False"),
        ("eigen_sam+spectral", "accepted with \\+spectral are sgd, .* of their own"),
        ("eigen_sam+coordinates", "accepted with \\+coordinates are sgd, .* of their"),
        ("spectral_sam+coordinates", "accepted with \\+coordinates are sgd, momentum"),
        ("subspace_adam+coordinates", "accepted with \\+coordinates are sgd, momentum"),
        ("dsbp+coordinates", "accepted with \\+coordinates are sgd, momentum, sam"),
        ("muon+lora", "accepted with \\+lora are sgd, momentum, sam, adam, adamw: the"),
        ("msam+coordinates", "accepted with \\+coordinates are sgd, momentum, sam"),
    ],
)
def test_what_does_not_fit_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        Contender.parse(text)
