"""Tasks in turn: each method keeps, or does not keep, what was learned before."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import data
from experiments.config import DataConfig, ModelConfig
from experiments.sequence_config import METHODS, SequenceConfig
from experiments.study.cells import Spec, Store
from experiments.tasks import sequence
from experiments.tasks.sequence import SequenceTask
from tests.experiments.commands import fails
from tests.experiments.fewshot_sets import ALPHABETS, CHARACTERS, Drawings
from tests.marks import quick

CONFIG = SequenceConfig(
    model=ModelConfig("mlp", {"hidden": (32, 24)}),
    tasks=3,
    task_steps=40,
    images=200,
    source_rank=12,
    tune_rate=3e-3,
)


def trained(text, steps=None, **options):
    """The state after all steps, and its task."""
    config = dataclasses.replace(CONFIG.with_contender(text), **options)
    task = SequenceTask(config)
    state = task.init(config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for number in range(steps or task.length(config).steps):
        state, _ = task.step(state, config, number)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
    return state, task, config


@pytest.mark.slow
def test_every_method_learns_and_those_that_hold_back_keep_more(tmp_path):
    store = Store(tmp_path)
    strengths = {"spectral_transfer": 30.0, "ewc": 3000.0, "l2sp": 1.0}
    configs = [
        dataclasses.replace(
            CONFIG.with_contender(name), strength=strengths.get(name, 1.0)
        )
        for name in METHODS
    ]
    cells = store.run([Spec(config) for config in configs])
    found = {name: cell.test for name, cell in zip(METHODS, cells, strict=True)}
    for name, test in found.items():
        assert test["last"] > 0.45, name  # chance is a third
    for name in ("ewc", "spectral_transfer", "project_away"):
        assert found[name]["first"] > found["full"]["first"], name


@pytest.mark.parametrize(
    "name", quick(["l2sp", "ewc", "spectral_transfer"], ["spectral_transfer"])
)
def test_without_strength_it_is_full_tuning_bit_for_bit(name):
    steps = CONFIG.task_steps + 5
    plain, *_ = trained("full", steps)
    state, *_ = trained(f"{name}:strength=0", steps)
    for ours, theirs in zip(
        jax.tree.leaves(state.trained), jax.tree.leaves(plain.trained), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_eigenspaces_are_of_the_sum_of_all_tasks_before():
    state, task, config = trained("spectral_transfer", 2 * CONFIG.task_steps + 1)
    space = state.held["bases"]["layers/0/kernel"]
    seen = [
        task._origin(config, None, None, None, at).seen.reshape(-1, 64)
        for at in range(2)
    ]
    trace = sum(float((x**2).sum()) / len(x) for x in map(np.asarray, seen))
    np.testing.assert_allclose(space.trace, trace, rtol=1e-3)
    used = np.asarray(space.values) > 0
    assert 12 < used.sum() <= 24
    gram = np.asarray(space.vectors.T @ space.vectors)
    np.testing.assert_allclose(gram[used][:, used], np.eye(used.sum()), atol=1e-4)


def test_protected_directions_do_not_move():
    state, *_ = trained("project_away:energy=1.0", 2 * CONFIG.task_steps)
    before, *_ = trained("project_away:energy=1.0", CONFIG.task_steps)
    vectors = state.held["bases"]["layers/0/kernel"].vectors
    kernel = lambda state: state.trained["layers"][0]["kernel"]
    change = kernel(state) - kernel(before)
    assert float(np.abs(vectors.T @ change).max()) < 1e-4
    assert float(np.abs(change).max()) > 1e-2


def test_alphabets_are_tasks(tmp_path, monkeypatch):
    Drawings(data_dir=tmp_path).download_and_prepare()
    found = data.load_alphabets(data_dir=str(tmp_path))
    assert [one.shape[:2] for one in found] == [(CHARACTERS, 4)] * ALPHABETS
    monkeypatch.setattr(sequence, "CHARACTERS", CHARACTERS)
    monkeypatch.setattr(sequence, "_HELD", 1)
    config = dataclasses.replace(CONFIG, data=DataConfig("omniglot", tmp_path))
    first, *others = sequence.sets(config)
    assert len(others) == 2
    assert (len(first.train), len(first.validation), len(first.test)) == (4, 2, 2)
    assert first.num_classes == CHARACTERS
    again = sequence.sets(dataclasses.replace(config, seed=1))
    assert any(
        not np.array_equal(a.train.images, b.train.images)
        for a, b in zip([first, *others], again, strict=True)
    )


def test_what_does_not_fit_is_said(capsys):
    many = dataclasses.replace(CONFIG, tasks=6)
    with pytest.raises(ValueError, match=r"tasks=6; accepted are up to 5, the pairs"):
        many.make()
    few = dataclasses.replace(CONFIG, data=DataConfig("omniglot", labels=20))
    with pytest.raises(ValueError, match=r"data\.labels=20; accepted is the default"):
        few.make()
    norm = dataclasses.replace(CONFIG, model=ModelConfig("resnet18", {"width": 4}))
    with pytest.raises(ValueError, match="statistics of batches"):
        norm.make()
    line = fails("train", ["sequence", "--tasks", "1"], capsys)
    assert "tasks=1" in line
