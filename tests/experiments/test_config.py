"""Configs, presets and the command line."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from experiments import cli, compare, train
from experiments.config import (
    Config,
    DataConfig,
    ModelConfig,
    ProbeConfig,
    differences,
    from_json,
    parse_options,
    to_json,
)
from experiments.optimizers import OptimizerConfig

PRESETS = ("cifar10", "digits", "fashion_mnist", "medmnist", "tiny_imagenet")


def test_a_config_survives_json():
    config = Config(
        data=DataConfig("x", data_dir=Path("a/b")),
        model=ModelConfig("mlp", {"hidden": (3, 4), "dtype": "bfloat16"}),
        optimizer=OptimizerConfig("adam", learning_rate=0.5),
        epochs=7,
    )
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_unknown_fields_of_json_are_named():
    with pytest.raises(ValueError, match=r"field of Config='epoch'.*epochs"):
        from_json(Config, {"epoch": 3})


def test_differences_are_named_by_their_path():
    new = Config(optimizer=OptimizerConfig(rank=3), seed=1)
    assert differences(new, Config()) == {"optimizer.rank": (3, 64), "seed": (1, 0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(epochs=0), "epochs=0; accepted are values of 1 or more"),
        (lambda: Config(seed=-1), "seed=-1"),
        (lambda: OptimizerConfig("adm"), r"optimizer.name='adm'.*nearest: adam"),
        (lambda: OptimizerConfig(residual=1.5), r"residual=1.5.*from 0 to 1"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate=nan"),
        (lambda: OptimizerConfig(rank=0), "rank=0"),
        (lambda: ProbeConfig(batch_size=-1), "probe.batch_size=-1"),
        (lambda: parse_options(["hidden"]), "model.options='hidden'.*NAME=VALUE"),
    ],
)
def test_values_that_are_not_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_preset_is_there_and_says_how_to_run_it():
    assert cli.preset_names() == sorted(PRESETS)
    for name in PRESETS:
        assert isinstance(cli.load_preset(name), Config)
        text = (cli.PRESETS / f"{name}.py").read_text()
        docstring = ast.get_docstring(ast.parse(text))
        command = "python -m experiments.train" + f" {name}" * (name != "digits")
        assert command in docstring


def test_a_preset_may_be_any_file(tmp_path):
    path = tmp_path / "mine.py"
    text = "from experiments.config import Config\ndef config(): return Config(seed=9)"
    path.write_text(text)
    command = cli.parse(train.Train, [str(path), "--epochs", "2"], "train")
    assert (command.config.seed, command.config.epochs) == (9, 2)


def test_options_replace_fields_of_the_preset_wherever_it_stands():
    args = ["--epochs", "2", "cifar10", "--data-dir", "a", "--optimizer.name", "sgd"]
    config = cli.parse(train.Train, args, "train").config
    preset = cli.load_preset("cifar10")
    assert differences(config, preset) == {
        "epochs": (2, preset.epochs),
        "data.data_dir": (Path("a"), None),
        "optimizer.name": ("sgd", preset.optimizer.name),
    }


def test_options_of_a_model():
    args = ["--model.options", "hidden=8,4", "dtype=bfloat16"]
    config = cli.parse(train.Train, args, "train").config
    assert config.model.options == {"hidden": (8, 4), "dtype": "bfloat16"}


@pytest.mark.parametrize("command", [train.Train, compare.Compare])
def test_help_describes_every_option(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.parse(command, ["--help"], "prog")
    assert exit_.value.code == 0
    text = capsys.readouterr().out

    def check(cls):
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)
            elif field.name != "preset":
                assert field.name.replace("_", "-") in text
                # The field may be inherited.
                body = "".join(
                    inspect.getsource(owner)
                    for owner in cls.__mro__
                    if field.name in vars(owner).get("__annotations__", {})
                )
                assert '"""' in body.split(f"    {field.name}: ")[1].split("\n\n")[0]

    check(command)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["cifar"], ["PRESET='cifar'", *PRESETS]),
        (["--epochs", "few"], ["--epochs", "'few'", "INT"]),
        (["--optimizer.nmae", "sgd"], ["--optimizer.nmae", "--optimizer.name"]),
        (["--optimizer.name", "adm"], ["optimizer.name='adm'", "momentum", "dsbp"]),
        (["--optimizer.schedule", "step"], ["'step'", "schedule", "cosine"]),
        (["--model.name", "lenet"], ["'lenet'", "mlp"]),
        (["--model.options", "depth=3"], ["depth", "mlp", "hidden"]),
        (["--batch-size", "5000"], ["batch_size=5000", "1257"]),
        (["fashion_mnist"], ["data_dir=None", "fashion_mnist"]),
        (["--name", "a/b"], ["name='a/b'"]),
        (["--resume", "--name", "none"], ["name='none'", "no run to resume"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(args, words, tmp_path, capsys):
    out = tmp_path / "runs"
    with pytest.raises(SystemExit) as exit_:
        train.main([*args, "--out", str(out)])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("experiments.train: error: ")
    for word in words:
        assert word in output.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optimizers", "sgd", "adm"], ["optimizers='adm'", "adam"]),
        (["--optimizers", "sgd", "sgd"], ["optimizers='sgd sgd'"]),
        (["--seeds", "0"], ["seeds=0"]),
        (["--learning-rates", "-1"], ["learning_rates=-1"]),
    ],
)
def test_mistakes_in_a_comparison(args, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
