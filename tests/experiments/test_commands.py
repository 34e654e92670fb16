"""Mistakes end every command with one line, before any work."""

import json
from pathlib import Path

import pytest

from experiments import cli, data, train
from experiments.bench import __main__ as bench
from experiments.config import ModelConfig
from tests.experiments.commands import fails


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Mistakes are found before there is any data, and so before any tracing."""

    def load(*args, **options):
        pytest.fail("data was loaded")

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(data, "load_fewshot", load)


MODELS = [
    ("mlp", "hidden=64,0", "hidden=(64, 0); accepted are one or more whole numbers"),
    ("mlp", "hidden=-3,", "hidden=(-3,)"),
    ("mlp", "hidden=()", "hidden=()"),
    ("mlp", "hidden=2.5,", "hidden=(2.5,)"),
    ("mlp", "hidden=True,", "hidden=(True,)"),
    ("mlp", "hidden=3e9,", "hidden=(3000000000.0,)"),
    ("mlp", "hidden=3000000000,", "from 1 to 1048576"),
    ("mlp", "hidden={[]}", "hidden='{[]}'"),
    ("mlp", "dtype=bf16", "dtype='bf16'; accepted are float32, bfloat16, float16"),
    ("mlp", "dtype=int8", "dtype='int8'"),
    ("mlp", "dtype=None", "dtype=None"),
    ("cnn", "channels=0,", "channels=(0,)"),
    ("cnn", "channels=8", "channels=8; accepted are one or more"),
    ("cnn", "hidden=0", "hidden=0; accepted are values of 1 or more"),
    ("conv4", "channels=0", "channels=0; accepted are values of 1 or more"),
    ("conv4", "pool=false", "pool='false'; accepted are True and False"),
    ("resnet18", "width=-8", "width=-8"),
    ("vit", "heads=3", "heads=3 does not divide dim=128"),
    ("vit", "heads=0", "heads=0; accepted are values of 1 or more"),
    ("vit", "depth=0", "depth=0"),
    ("vit", "patch=0", "patch=0"),
    ("vit", "mlp_dim=-1", "mlp_dim=-1"),
    ("vit", "colour=3", "colour: not an option of 'vit'; accepted are patch, dim"),
]


@pytest.mark.parametrize(("model", "option", "message"), MODELS)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_impossible_models(model, option, message, tmp_path, capsys):
    args = ["digits", "--model.name", model, "--model.options", option]
    out = str(tmp_path / "runs")
    assert message in fails("train", [*args, "--out", out], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["compare", "train"])
@pytest.mark.parametrize("preset", ["digits", "sine"])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_impossible_models_of_other_commands(name, preset, tmp_path, capsys):
    args = [
        preset,
        "--out",
        str(tmp_path / "runs"),
        "--model.name",
        "cnn",
        "--model.options",
    ]
    assert "channels=(0,)" in fails(name, [*args, "channels=0,"], capsys)
    assert "dtype='fp16'" in fails(name, [*args, "dtype=fp16"], capsys)
    assert not list(tmp_path.iterdir())


def test_possible_models():
    for name, options in {
        "mlp": {"hidden": [8], "dtype": "float16"},
        "cnn": {"channels": (4,), "dtype": data.batches.jnp.bfloat16},
        "vit": {"patch": None, "mlp_dim": None, "dim": 12, "heads": 3},
    }.items():
        assert ModelConfig(name, options).options == options


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("train", "--model.options hidden=8, hidden=9,", "one value of hidden"),
        ("train", "--seed 99999999999999999999", "from 0 to 4294967295"),
        ("train", "--epochs 99999999999", "values up to 2147483647"),
        ("train", "--data.split-seed -1", "data.split_seed=-1"),
        ("train", "--data.label-noise nan", "data.label_noise=nan"),
        ("train", "--optimizer adam:learning_rate=nan", "learning_rate='nan'"),
        ("train", "--optimizer adam:learning_rate=-0.1", "learning_rate=-0.1"),
        ("train", "--optimizer adam:weight_decay=-1", "weight_decay=-1"),
        ("train", "--optimizer adam:rank=8", "option of adam='rank'; accepted are"),
        ("train", "--optimizer adam+coordinates:tracking=65", "tracking=65; accepted"),
        ("train", "--optimizer dsbp:rank=99999999999", "rank=99999999999"),
        ("train", "--minutes nan", "minutes=nan"),
        ("train", "text --heads 3", "heads=3; accepted are divisors"),
        ("compare", "--contenders sgd sgd", "contenders='sgd sgd'; accepted are one"),
        ("compare", "--contenders sgd dsbp+coordinates", "accepted with +coordinates"),
        ("compare", "sine --contenders maml mml", "method='mml'; accepted are maml"),
        ("compare", "--seed 4294967295 --seeds 2", "from 0 to 4294967295"),
        ("compare", "--sharpness --probe.batch-size 0", "sharpness=True"),
        ("train", "sine --inner.learning-rate nan", "inner.learning_rate=nan"),
        ("train", "sine --steps 99999999999", "values up to 2147483647"),
        ("train", "sine --ways 1", "ways=1; accepted are values of 2 or more"),
        (
            "train",
            "sine --method reptile --reptile.batch-size 21",
            "reptile.batch_size=21; accepted are 1 to 20",
        ),
        ("tables", "nothing", "NAME='nothing'; accepted are"),
        ("tables", "--scale large", "large"),
        ("tables", "--jobs 0", "jobs=0"),
        ("bench", "nothing", "'nothing'"),
        ("bench", "step --step.widths 0", "step.widths=(0,)"),
        ("bench", "step --step.widths", "step.widths=()"),
        ("bench", "step --step.widths 32", "accepted are 64 or more"),
        ("bench", "step --step.ranks 8 -1", "step.ranks=(8, -1)"),
        ("bench", "step --step.rounds 0", "step.rounds=0"),
        ("bench", "update --update.shapes", "update.shapes=''"),
        ("bench", "meta --meta.steps", "meta.steps=()"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_impossible_values(name, args, message, tmp_path, capsys):
    out = str(tmp_path / "runs")
    assert message in fails(name, [*args.split(), "--out", out], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--batch-size 1258", "batch_size=1258; accepted are 1 to 1257"),
        ("--epochs 999999999", "of 19 steps each"),
        ("--model.name vit --model.options patch=3", "accepted are 1, 2, 4, 8"),
        ("--model.name conv4 --model.options pool=True", "16 × 16 pixels or more"),
    ],
)
def test_what_the_images_do_not_allow(args, message, tmp_path, capsys):
    out = str(tmp_path / "runs")
    for name in ("train", "compare"):
        line = fails(name, ["digits", *args.split(), "--out", out], capsys)
        assert message in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["a file", "in a file", "a dangling link", "no real folder"])
def bad_folder(request, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "far")
    path = {
        "a file": tmp_path / "file",
        "in a file": tmp_path / "file" / "runs",
        "a dangling link": tmp_path / "link",
        "no real folder": Path("/proc"),
    }[request.param]
    if request.param == "no real folder" and not path.is_dir():
        pytest.skip("there is no /proc")
    return path


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("train", "--optimizer sgd"),
        ("compare", "--contenders sgd"),
        ("train", "sine --method maml"),
        ("tables", "--scale smoke"),
        ("bench", "engine"),
    ],
)
def test_folders_that_cannot_be_written_in(name, args, bad_folder, capsys, monkeypatch):
    begin = lambda options: pytest.fail("a benchmark was run")
    monkeypatch.setattr(bench, "BENCHMARKS", dict.fromkeys(bench.BENCHMARKS, begin))
    out = bad_folder / "a.json" if name == "bench" else bad_folder
    line = fails(name, [*args.split(), "--out", str(out)], capsys)
    assert line.startswith("out='")


def test_a_folder_is_no_file_of_results(tmp_path, capsys):
    line = fails("bench", ["engine", "--out", str(tmp_path)], capsys)
    assert "is a folder; accepted is a file" in line


def test_data_folders_that_are_none(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = ["--out", str(tmp_path / "runs")]
    for preset in ("cifar10", "omniglot"):
        args = [preset, *out, "--data-dir", str(tmp_path / "file")]
        assert "is no folder" in fails("train", args, capsys)
        args[-1] += "/x"
        assert "Not a directory" in fails("train", [*args, "--download"], capsys)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b"])
def test_names_that_are_no_folder(name, tmp_path, capsys):
    args = ["--out", str(tmp_path / "runs"), "--name", name, "--overwrite"]
    assert f"name={name!r}" in fails("train", args, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def config(:", "SyntaxError"),
        ("x = 1", "has no attribute 'config'"),
        (
            "def config():\n    return 3",
            "gives a int; accepted are presets of a Config",
        ),
        (
            "from experiments.config import *\ndef config():\n"
            "    return ImageConfig(epochs='3')",
            "line 3; accepted is a file with",
        ),
    ],
)
def test_presets_that_give_no_config(text, message, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    line = fails("train", [str(path), "--out", str(tmp_path / "runs")], capsys)
    assert "PRESET='" in line
    assert message in line


def test_options_are_checked_beside_those_of_their_preset(tmp_path):
    path = tmp_path / "mine.py"
    text = (
        "from experiments.config import *\ndef config():\n"
        "    return ImageConfig(model=ModelConfig('vit'), epochs=3)"
    )
    path.write_text(text, encoding="utf-8")
    args = [str(path), "--model.options", "depth=2"]
    config = cli.parse(train.Train, args, "train").config
    assert config.epochs == 3
    assert config.model == ModelConfig("vit", {"depth": 2})


def test_options_of_a_preset_come_after_it(tmp_path, capsys):
    line = fails("train", ["--seed", "1", "sine", "--out", str(tmp_path)], capsys)
    assert "sine" in line


def test_a_table_without_its_data_is_made_with_its_reason(tmp_path, capsys):
    path = tmp_path / "mine.py"
    text = (
        "from experiments.config import *\nfrom experiments.study.tables import Table\n"
        "def table(scale):\n"
        "    config = ImageConfig(data=DataConfig('cifar10'))\n"
        "    return Table('t', 'c', config, ('sgd',))"
    )
    path.write_text(text, encoding="utf-8")
    args = [str(path), "--out", str(tmp_path / "out")]
    line = fails("tables", args, capsys, code=1)
    assert "has no result" in line
    result = json.loads((tmp_path / "out" / "mine.json").read_text(encoding="utf-8"))
    assert "data_dir=None" in result["rows"][0]["failed"]


def test_results_of_another_version_are_refused(tmp_path, capsys):
    version = tmp_path / "cells" / "version.json"
    version.parent.mkdir()
    version.write_text('{"format": 0}', encoding="utf-8")
    args = ["--scale", "smoke", "--out", str(tmp_path)]
    assert "are of version {'format': 0}" in fails("tables", args, capsys)
