"""Training runs on digits, from the command to the files."""

import json

import numpy as np
import optax
import pytest
import threadpoolctl

from experiments import data, models, process, train
from experiments.config import DataConfig, ImageConfig, ModelConfig, ProbeConfig
from experiments.optimizers import Contender
from experiments.study import loop
from experiments.study.loop import Diverged
from experiments.tasks.images import Classifier, ImageTask
from tests.experiments.small_runs import DSBP, PROBED, SMALL, Restless, records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*PROBED, *DSBP, "--out", str(out)])
    return out / "digits-dsbp-seed0"


def test_a_run_writes_its_folder(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "report.html",
    }
    described = json.loads((finished / "config.json").read_text())
    assert described["preset"] == "digits"
    assert described["config"]["optimizer"]["optimizer"]["rank"] == 8
    assert {"jax", "optax", "device", "devices", "cores"} <= set(described["ran_on"])
    assert {"command", "commit", "date"} <= set(described)


def test_metrics_have_a_line_for_each_evaluation_and_one_test(finished):
    *epochs, test = records(finished)
    assert [record["step"] for record in epochs] == [0, 4, 8, 12]
    assert epochs[0]["train"] is None
    for record in epochs[1:]:
        for split in ("train", "validation"):
            assert set(record[split]) == {"loss", "accuracy"}
        assert set(record["probe"]) == {"layers", "hessian"}
        assert all(leaf["failures"] == 0 for leaf in record["bases"].values())
        assert set(record["bases"]) <= {"layers/0/kernel", "head/kernel"}
        assert record["bases"]
    assert epochs[3]["train"]["loss"] < epochs[1]["train"]["loss"]
    assert "test" not in json.dumps(epochs)
    assert test["test"]["accuracy"] > 0.2


def test_a_finished_run_is_not_trained_again(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    train.main(["--resume", "--out", str(finished.parent)])
    assert (finished / "metrics.jsonl").read_text() == before
    output = capsys.readouterr()
    assert "test accuracy" in output.out
    assert output.err == ""


@pytest.mark.slow
def test_a_second_run_of_a_name_asks_or_is_numbered(tmp_path, capsys):
    args = [*SMALL, "--epochs", "1", "--probe.batch-size", "0"]
    args += ["--optimizer", "sgd", "--out", str(tmp_path)]
    train.main([*args, "--name", "mine"])
    first = (tmp_path / "mine" / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as exit_:
        train.main([*args, "--name", "mine"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "name='mine'" in error
    assert "--resume" in error
    assert "--overwrite" in error
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == first

    train.main([*args, "--name", "mine", "--overwrite", "--seed", "1"])
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() != first
    for _ in range(2):
        train.main(args)
    names = {"mine", "digits-sgd-seed0", "digits-sgd-seed0-2"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_only_runs_are_overwritten(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--out", str(tmp_path), "--name", "thesis", "--overwrite"])
    assert "holds no config.json" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_diverged_run_says_at_which_step(tmp_path, capsys):
    args = [*SMALL, "--optimizer", "sgd:learning_rate=1e30"]
    with pytest.raises(SystemExit) as exit_:
        train.main([*args, "--out", str(tmp_path)])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "loss is nan at step 2; try a lower learning_rate than 1e+30" in error
    assert [record["step"] for record in records(*tmp_path.iterdir())] == [0]


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", interrupt)
    with pytest.raises(SystemExit) as exit_:
        train.main([*SMALL, "--out", str(tmp_path), "--name", "mine"])
    assert exit_.value.code == 130
    assert f"--resume --name mine --out {tmp_path}" in capsys.readouterr().err


def test_eigenvalues_are_solved_by_one_thread():
    libraries = process.single_threaded_lapack(threadpoolctl.threadpool_info)()
    blas = [library for library in libraries if library["user_api"] == "blas"]
    assert blas
    assert all(library["num_threads"] == 1 for library in blas)


def small_config(optimizer="sgd:learning_rate=0.1", **fields):
    return ImageConfig(
        model=ModelConfig("mlp", {"hidden": (16,)}),
        optimizer=Contender.parse(optimizer),
        probe=ProbeConfig(0),
        epochs=2,
        batch_size=256,
        **fields,
    )


def train_steps(task, config, steps, state=None, first=0):
    """Steps from a number on, or from the start."""
    state = task.init(config) if state is None else state
    return loop.train(task, config, state, first=first, until=first + steps)


@pytest.fixture(scope="module")
def small():
    """A task that holds no state, and its config."""
    return ImageTask(small_config()), small_config()


def test_evaluation_covers_a_split_whatever_the_batch(small):
    task, config = small
    state, split = task.init(config), data.load("digits").validation
    logits, _ = task.classifier.apply(
        state.params, state.rest, split.images, mode="eval"
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    accuracy = np.mean(np.argmax(logits, -1) == split.labels)
    for batch_size in (7, 180, 500):
        found = task.evaluate(state, "validation", config, batch_size)
        assert found["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert found["accuracy"] == pytest.approx(accuracy)


def test_divergence_names_the_first_bad_step_of_a_window(small):
    task, _ = small
    config = small_config("sgd:learning_rate=1e30")
    with pytest.raises(Diverged, match=r"nan at step 2; .*than 1e\+30"):
        train_steps(task, config, 4)


def test_seeds_give_different_runs_and_the_same_seed_the_same(small):
    task, _ = small
    first, again, other = (
        np.asarray(train_steps(task, config, 4).state.params["head"]["kernel"])
        for config in (small_config(), small_config(), small_config(seed=1))
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_batches_follow_from_seed_and_step_alone(small):
    task, config = small
    numbers = [0, 1, 2, 3, 4, 5, 2, 4]
    found = {}
    for number in numbers:
        images, labels = task.batch(config, number)
        assert images.shape == (256, 8, 8, 1)
        before = found.setdefault(number, (images, labels))
        np.testing.assert_array_equal(before[0], images)
        np.testing.assert_array_equal(before[1], labels)
    assert not np.array_equal(found[0][1], found[4][1])  # the next epoch's first
    assert not np.array_equal(task.batch(small_config(seed=1), 0)[1], found[0][1])


def test_augmentation_depends_on_seed_and_step_alone(small):
    config = small_config(data=DataConfig(augment=True))
    task = ImageTask(config)
    run = lambda *given: train_steps(*given, 4).means["loss"]
    assert run(task, config) == run(task, config) != run(*small)


def test_options_of_the_wrong_type_are_a_users_error():
    with pytest.raises(ValueError, match=r"model.options={'hidden': 3}"):
        Classifier(data.load("digits"), ModelConfig("mlp", {"hidden": 3}))


def test_the_rest_of_a_model_moves_in_training_only(monkeypatch):
    monkeypatch.setitem(models.MODELS, "restless", Restless)
    config = ImageConfig(
        model=ModelConfig("restless"),
        optimizer=Contender.parse("sgd:learning_rate=0.01"),
        probe=ProbeConfig(0),
    )
    task = ImageTask(config)
    state = task.init(config)
    mean = np.array(state.rest["norm"]["mean"])
    task.evaluate(state, "validation", config)
    state = train_steps(task, config, 2, state).state
    assert np.abs(state.rest["norm"]["mean"] - mean).min() > 0
    assert int(state.rest["dropout"]["rngs"]["count"]) == 2


@pytest.mark.slow
def test_bytes_are_predicted(tmp_path, capsys):
    args = ["text", "--steps", "4", "--width", "16", "--depth", "1", "--heads", "2"]
    args += ["--context", "16", "--eval-every", "2", "--eval-windows", "64"]
    train.main([*args, "--out", str(tmp_path)])
    first, *_, test = records(tmp_path / "text-adamw-seed0")
    assert first["validation"]["loss"] == pytest.approx(np.log(256), abs=1.5)
    assert test["test"]["loss"] < first["validation"]["loss"]
    assert "nats per byte" in capsys.readouterr().out
