"""Training runs on digits, from the command to the files."""

import json

import numpy as np
import optax
import pytest
import threadpoolctl

from experiments import data, models, process, train
from experiments.config import Config, ModelConfig, ProbeConfig
from experiments.loop import Diverged, make_trainer, train_epoch
from experiments.optimizers import OptimizerConfig
from experiments.steps import Classifier, Trainer
from tests.experiments.small_runs import PROBED, SMALL, Restless, records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*PROBED, "--optimizer.name", "dsbp", "--out", str(out)])
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
    assert described["config"]["optimizer"]["rank"] == 8
    assert {"jax", "optax", "device", "devices", "cores"} <= set(described["ran_on"])


def test_metrics_have_a_line_for_each_epoch_and_one_test(finished):
    *epochs, test = records(finished)
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3]
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


def test_a_second_run_of_a_name_asks_or_is_numbered(tmp_path, capsys):
    args = [*SMALL, "--epochs", "1", "--probe.batch-size", "0"]
    args += ["--optimizer.name", "sgd", "--out", str(tmp_path)]
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
    args = [*SMALL, "--optimizer.name", "sgd", "--optimizer.learning-rate", "1e30"]
    with pytest.raises(SystemExit) as exit_:
        train.main([*args, "--out", str(tmp_path)])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "loss is nan at step 2 (epoch 1)" in error
    assert [record["epoch"] for record in records(*tmp_path.iterdir())] == [0]


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_experiment", interrupt)
    with pytest.raises(SystemExit) as exit_:
        train.main([*SMALL, "--out", str(tmp_path), "--name", "mine"])
    assert exit_.value.code == 130
    assert f"--resume --name mine --out {tmp_path}" in capsys.readouterr().err


def test_eigenvalues_are_solved_by_one_thread():
    libraries = process.single_threaded_lapack(threadpoolctl.threadpool_info)()
    blas = [library for library in libraries if library["user_api"] == "blas"]
    assert blas
    assert all(library["num_threads"] == 1 for library in blas)


def small_trainer(optimizer=None, **fields):
    config = Config(
        model=ModelConfig("mlp", {"hidden": (16,)}),
        optimizer=optimizer or OptimizerConfig("sgd"),
        probe=ProbeConfig(0),
        epochs=2,
        batch_size=256,
        **fields,
    )
    return make_trainer(data.load("digits"), config)


def test_evaluation_covers_a_split_whatever_the_batch():
    trainer = small_trainer()
    state, split = trainer.init(0), data.load("digits").validation
    logits, _ = trainer.classifier.apply(
        state.params, state.rest, split.images, mode="eval"
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    accuracy = np.mean(np.argmax(logits, -1) == split.labels)
    for batch_size in (7, 180, 500):
        found = trainer.evaluate(state, split, batch_size)
        assert found["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert found["accuracy"] == pytest.approx(accuracy)


def test_divergence_names_the_first_bad_step_of_a_window():
    trainer = small_trainer()
    state = trainer.init(0)
    state, _ = train_epoch(trainer, state, seed=0, epoch=0, peak=0.1)
    with pytest.raises(Diverged, match=r"at step 6 \(epoch 2\).*than 1e\+30"):
        train_epoch(trainer, state, seed=0, epoch=1, peak=1e30)


def test_seeds_give_different_runs_and_the_same_seed_the_same():
    trainer = small_trainer()
    ends = [
        train_epoch(trainer, trainer.init(seed), seed=seed, epoch=0, peak=0.1)[0]
        for seed in (0, 0, 1)
    ]
    first, again, other = (np.asarray(end.params["head"]["kernel"]) for end in ends)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_augmentation_depends_on_seed_and_step_alone():
    trainer = small_trainer()
    augmented = small_trainer(data=train.DataConfig(augment=True))
    run = lambda trainer: train_epoch(
        trainer, trainer.init(0), seed=0, epoch=0, peak=0.1
    )[1]["loss"]
    assert run(augmented) == run(augmented) != run(trainer)


def test_options_of_the_wrong_type_are_a_users_error():
    with pytest.raises(ValueError, match=r"model.options={'hidden': 3}"):
        Classifier(data.load("digits"), ModelConfig("mlp", {"hidden": 3}))


def test_the_rest_of_a_model_moves_in_training_only(monkeypatch):
    monkeypatch.setitem(models.MODELS, "restless", Restless)
    config = Config(model=ModelConfig("restless"), optimizer=OptimizerConfig("sgd"))
    classifier = Classifier(data.load("digits"), config.model)
    trainer = Trainer(classifier, config, num_steps=10)
    state = trainer.init(0)
    mean = np.array(state.rest["norm"]["mean"])
    trainer.evaluate(state, classifier.dataset.validation)
    state, _ = train_epoch(trainer, state, seed=0, epoch=0, peak=0.01, max_steps=2)
    assert np.abs(state.rest["norm"]["mean"] - mean).min() > 0
    assert int(state.rest["dropout"]["rngs"]["count"]) == 2
