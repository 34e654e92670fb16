"""Configs, presets and the command line."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, compare, tasks, train
from experiments.config import (
    DataConfig,
    ImageConfig,
    ModelConfig,
    ProbeConfig,
    TextConfig,
    parse_options,
)
from experiments.fewshot_config import FewshotConfig
from experiments.optimizers import Contender
from experiments.sequence_config import SequenceConfig
from experiments.shifted_config import ShiftedConfig
from experiments.study.config import (
    Config,
    differences,
    from_json,
    to_json,
    what,
    with_places,
)
from experiments.tasks.images import ImageTask
from experiments.transfer_config import TransferConfig

IMAGES = ("cifar10", "digits", "fashion_mnist", "medmnist", "tiny_imagenet")
SHIFTED = ("shifted", "shifted_batch_norm", "shifted_layer_norm")
TUNED = ("compression", "sequence", "transfer")
OTHERS = ("cifar_fs", "omniglot", "sine", "suite", "text")
PRESETS = sorted((*IMAGES, *SHIFTED, *TUNED, *OTHERS))


def test_a_config_survives_json():
    config = ImageConfig(
        data=DataConfig("x", data_dir=Path("a/b")),
        model=ModelConfig("mlp", {"hidden": (3, 4), "dtype": "bfloat16"}),
        optimizer=Contender.parse("adam+spectral:learning_rate=0.5,rank=3"),
        epochs=7,
    )
    others = TextConfig(seed=3), FewshotConfig(method="anil"), ShiftedConfig(images=9)
    for one in (config, *others):
        assert tasks.read(json.loads(json.dumps(with_places(one)))) == one
    assert "data_dir" not in what(config)["data"]


def test_unknown_fields_of_json_are_named():
    with pytest.raises(ValueError, match=r"field of ImageConfig='epoch'.*epochs"):
        from_json(ImageConfig, {"epoch": 3})
    with pytest.raises(ValueError, match="task='Config'; accepted are ImageConfig"):
        tasks.read({"task": "Config"})


def test_differences_are_named_by_their_path():
    new = ImageConfig(optimizer=Contender.parse("dsbp:rank=3"), seed=1)
    found = {"optimizer.optimizer.rank": (3, 64), "seed": (1, 0)}
    assert differences(new, ImageConfig()) == found
    other = ImageConfig(optimizer=Contender.parse("adam"))
    assert {"optimizer.name", "optimizer.optimizer"} == set(
        differences(other, ImageConfig())
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageConfig(epochs=0), "epochs=0; accepted are values of 1 or more"),
        (lambda: ImageConfig(seed=-1), "seed=-1"),
        (lambda: ImageConfig(steps=0), "steps=0"),
        (lambda: ImageConfig(minutes=0), "minutes=0"),
        (lambda: ShiftedConfig(setting="sorted"), "setting='sorted'; accepted are res"),
        (lambda: ShiftedConfig(severity=6), "severity=6; accepted are 1, 2, 3, 4, 5"),
        (lambda: TextConfig(heads=3), "heads=3; accepted are divisors of width=128"),
        (lambda: ProbeConfig(batch_size=-1), "probe.batch_size=-1"),
        (lambda: parse_options(["hidden"]), "model.options='hidden'.*NAME=VALUE"),
    ],
)
def test_values_that_are_not_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_preset_is_there_and_says_how_to_run_it():
    assert cli.preset_names() == PRESETS
    for name in PRESETS:
        assert isinstance(cli.load_preset(name), Config)
        text = (cli.PRESETS / f"{name}.py").read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text))
        program = "inference" if name in SHIFTED else "train"
        verb = "compare" if name in TUNED else program
        command = f"python -m experiments.{verb}" + f" {name}" * (name != "digits")
        assert command in docstring


def test_a_preset_may_be_any_file(tmp_path):
    path = tmp_path / "mine.py"
    text = "from experiments.config import *\ndef config(): return ImageConfig(seed=9)"
    path.write_text(text)
    command = cli.parse(train.Train, [str(path), "--epochs", "2"], "train")
    assert (command.config.seed, command.config.epochs) == (9, 2)


def test_options_replace_fields_of_the_preset():
    args = [
        "cifar10",
        "--epochs",
        "2",
        "--data-dir",
        "a",
        "--optimizer",
        "sgd:warmup=0",
    ]
    config = cli.parse(train.Train, args, "train").config
    preset = cli.load_preset("cifar10")
    assert config == dataclasses.replace(
        preset,
        epochs=2,
        data=dataclasses.replace(preset.data, data_dir=Path("a")),
        optimizer=Contender.parse("sgd:warmup=0"),
    )
    with pytest.raises(ValueError, match="cifar10"):
        cli.parse(train.Train, ["--epochs", "2", "cifar10"], "train")


def test_options_of_a_model():
    args = ["digits", "--model.options", "hidden=8,4", "dtype=bfloat16"]
    config = cli.parse(train.Train, args, "train").config
    assert config.model.options == {"hidden": (8, 4), "dtype": "bfloat16"}


@pytest.mark.parametrize("preset", ["digits", "sine", "text"])
@pytest.mark.parametrize("command", [train.Train, compare.Compare])
def test_help_describes_every_option(command, preset, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.parse(command, [preset, "--help"], "prog")
    assert exit_.value.code == 0
    text = capsys.readouterr().out

    def check(cls):
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)
            elif field.name not in ("preset", "config"):
                assert field.name.replace("_", "-") in text
                # The field may be inherited.
                body = "".join(
                    inspect.getsource(owner)
                    for owner in cls.__mro__
                    if field.name in vars(owner).get("__annotations__", {})
                )
                assert '"""' in body.split(f"    {field.name}: ")[1].split("\n\n")[0]

    check(command)
    check(type(cli.load_preset(preset)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["cifar"], ["PRESET='cifar'", *PRESETS]),
        (["--epochs", "few"], ["--epochs", "'few'", "INT"]),
        (["--optimzer", "sgd"], ["--optimzer", "--optimizer"]),
        (["--optimizer", "adm"], ["optimizer='adm'", "momentum", "dsbp"]),
        (["--optimizer", "sgd:schedule=step"], ["'step'", "schedule", "cosine"]),
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
        (["--contenders", "sgd", "adm"], ["optimizer='adm'", "adam"]),
        (["--contenders", "sgd", "sgd"], ["contenders='sgd sgd'"]),
        (["--contenders", "sgd:rate=1"], ["option of sgd='rate'"]),
        (["--views", "speed"], ["views='speed'", "evaluations"]),
        (["--tune", "inner"], ["tune='inner'", "rate, decay"]),
        (["--metrics", "f1"], ["metrics='f1'", "accuracy, loss"]),
        (["--seeds", "0"], ["seeds=0"]),
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


def test_a_later_field_at_its_default_leaves_keys_as_they_were():
    config = ImageConfig()
    assert "labels" not in to_json(config)["data"]
    assert from_json(ImageConfig, to_json(config)) == config
    few = dataclasses.replace(config, data=DataConfig(labels=200))
    assert what(few)["data"]["labels"] == 200
    assert from_json(ImageConfig, to_json(few)) == few
    assert len(ImageTask(few).dataset.train) == 200
    with pytest.raises(ValueError, match=r"data\.labels=0; accepted are"):
        DataConfig(labels=0)


def test_with_folds_each_seed_has_its_own_images():
    plain, parts = ImageConfig(seed=7), ImageConfig(DataConfig(folds=5), seed=7)
    assert (plain.shared().seed, plain.overlap) == (0, 0)
    assert (parts.shared().seed, parts.overlap) == (7, 1 / 4)
    at = lambda seed: dataclasses.replace(parts, seed=seed).make().dataset
    first, second = at(1), at(2)
    assert not np.array_equal(first.test.labels, second.test.labels)
    assert parts.make().metrics["accuracy"].examples is None
    with pytest.raises(ValueError, match=r"seed=2; accepted is 7"):
        parts.make().init(dataclasses.replace(parts, seed=2))
    with pytest.raises(ValueError, match=r"data\.labels=100; accepted is None"):
        DataConfig(folds=5, labels=100)


@pytest.mark.parametrize("config", [TransferConfig, ShiftedConfig, SequenceConfig])
def test_folds_are_refused_where_a_model_is_trained_once(config):
    with pytest.raises(ValueError, match=r"data\.folds=5; accepted is None"):
        config(data=DataConfig(folds=5))
