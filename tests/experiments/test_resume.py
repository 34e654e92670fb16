"""Runs that are interrupted end as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import models, tasks, train
from experiments.config import ImageConfig
from experiments.study import runs
from experiments.study.checkpoints import Checkpoints
from experiments.study.config import to_json
from tests.experiments.small_runs import DSBP, PROBED, SMALL, Restless, records

ARGS = [*SMALL, *DSBP, "--data.augment"]
RESTLESS = [*PROBED, "--model.name", "restless", "--optimizer", "momentum"]
RESTLESS += ["--probe.hessian-steps", "0"]


def final_state(folder: Path):
    """All arrays of the last checkpoint by name, read without our own code."""
    manager = ocp.CheckpointManager(folder / "checkpoints")
    step = manager.latest_step()
    paths = (folder / "checkpoints" / str(step)).iterdir()
    names = sorted(path.name for path in paths if path.is_dir())
    items = {name: ocp.args.StandardRestore() for name in names}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    manager.close()
    return {
        f"{name}: {path}": value
        for name in items
        for path, value in restored[name].items()
    }


def without_time(folder: Path):
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "looks")}
        for record in records(folder)
    ]


def assert_same_run(folder: Path, reference: Path):
    ours, theirs = final_state(folder), final_state(reference)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert without_time(folder) == without_time(reference)


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    """Compiled steps are shared by the runs of this file; they hold no state."""
    make, made = train.make_task, {}

    def make_once(config):
        key = json.dumps(to_json(config))
        if key not in made:
            made[key] = make(config)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_task", make_once)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("reference")
    train.main([*ARGS, "--out", str(out)])
    return out / "digits-dsbp-seed0"


@pytest.fixture(scope="module")
def restless_reference(tmp_path_factory):
    """The same of a model with running statistics and random numbers."""
    out = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "restless", Restless)
        train.main([*RESTLESS, "--out", str(out)])
    return out / "digits-momentum-seed0"


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_after(monkeypatch, method: str, calls: int, when: str):
    """Makes a method of `Checkpoints` or `Run` end the process at a certain call."""
    owner = Checkpoints if method == "save" else runs.Run
    original, count = getattr(owner, method), iter(range(1, 1000))

    def killing(self, *args, **kwargs):
        last = next(count) == calls
        if last and when == "before":
            raise Killed
        original(self, *args, **kwargs)
        if last:
            raise Killed

    monkeypatch.setattr(owner, method, killing)


@pytest.mark.parametrize(
    ("method", "calls", "when"),
    [
        # before the first checkpoint
        pytest.param("save", 1, "before", marks=pytest.mark.slow),
        ("save", 2, "after"),  # after a checkpoint
        ("save", 3, "before"),  # logged, but not saved
        # trained to the end, but not tested
        pytest.param("save", 4, "after", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_the_same(
    method, calls, when, reference, tmp_path, monkeypatch
):
    args = [*ARGS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_after(patch, method, calls, when)
        with pytest.raises(Killed):
            train.main(args)
    train.main([*args, "--resume"])
    assert_same_run(tmp_path / "digits-dsbp-seed0", reference)


@pytest.mark.slow
def test_everything_in_the_model_is_resumed(restless_reference, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "restless", Restless)
    args = [*RESTLESS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        kill_after(patch, "save", 2, "after")
        with pytest.raises(Killed):
            train.main(args)
    train.main([*args, "--resume"])
    assert_same_run(tmp_path / "digits-momentum-seed0", restless_reference)


@pytest.mark.slow
def test_a_run_killed_in_truth_ends_the_same(reference, tmp_path):
    command = [sys.executable, "-m", "experiments.train", *ARGS]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=Path(train.__file__).parents[1],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path / "digits-dsbp-seed0"
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    try:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    train.main([*ARGS, "--out", str(tmp_path), "--resume"])
    assert_same_run(folder, reference)


def test_options_that_are_not_given_are_those_of_the_run(reference, tmp_path, capsys):
    out = str(reference.parent)
    train.main(["digits", "--resume", "--name", reference.name, "--out", out])
    assert "12, " in capsys.readouterr().out
    args = ["--resume", "--name", reference.name, "--out", out, "--data-dir", "x"]
    train.main(args)


def test_a_resumed_run_stays_the_same_experiment(reference, capsys):
    args = ["--resume", "--name", reference.name, "--out", str(reference.parent)]
    with pytest.raises(SystemExit) as exit_:
        train.main([*args, "--batch-size", "9"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "batch_size=9" in error
    assert "started with 256" in error


def test_resume_without_a_name_takes_the_latest(tmp_path):
    for name in ("p-dsbp-seed0", "p-dsbp-seed0-2", "p-dsbp-seed0-10", "p-dsbp-seed01"):
        runs.start(tmp_path, name, "p", ImageConfig(), overwrite=False)
    latest = runs.find(tmp_path, None, "p-dsbp-seed0", tasks.read)
    assert latest.path.name == "p-dsbp-seed0-10"


def test_a_torn_line_is_left_out(tmp_path):
    run = runs.start(tmp_path, "run", "p", ImageConfig(), overwrite=False)
    for step in (0, 5, 10):
        run.log({"step": step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 1')
    assert [record["step"] for record in run.records()] == [0, 5, 10]
    run.truncate(5)
    assert run.metrics_path.read_text() == '{"step": 0}\n{"step": 5}\n'
    run.truncate(None)
    assert run.records() == []


def test_a_damaged_config_is_one_clear_error(tmp_path):
    run = runs.start(tmp_path, "run", "p", ImageConfig(), overwrite=False)
    (run.path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"name='run'; cannot read .*config.json"):
        runs.find(tmp_path, "run", "base", tasks.read)


def test_checkpoints_hold_every_kind_of_leaf(tmp_path):
    tree = {
        "key": jax.random.key(3),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "count": (jnp.int32(7), {0: jnp.ones((2, 2))}),
        "nothing": (),
        "empty": jnp.zeros((0, 4)),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree=tree)
    like = jax.tree.map(lambda leaf: leaf, tree)
    restored = checkpoints.restore(1, tree=like)["tree"]
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert jax.random.uniform(restored["key"]) == jax.random.uniform(tree["key"])
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(restored), strict=True):
        assert old.dtype == new.dtype


def test_an_unfinished_checkpoint_is_not_seen(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, params={"w": jnp.ones(3)})
    checkpoints.close()
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "params").touch()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    checkpoints.close()
