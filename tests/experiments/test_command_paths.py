"""Commands take paths as they are typed."""

import dataclasses
import functools
import typing
from pathlib import Path

import pytest

from experiments import cli, data, paths, train
from tests.experiments.commands import OPTIONS


def path_options(options, prefix=""):
    """The options of a command that are paths, and how to get at them."""
    hints = typing.get_type_hints(options)
    if options in (cli.Command, *cli.Command.__subclasses__()):
        hints["config"] = type(cli.load_preset(options().preset))
    for field in dataclasses.fields(options):
        hint, option = hints[field.name], prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            inner = "" if field.name == "config" else f"{option}."
            for name, get in path_options(hint, inner):
                yield (
                    name,
                    lambda o, get=get, field=field: get(getattr(o, field.name)),
                )
        elif Path in (hint, *typing.get_args(hint)):
            yield f"--{option}", lambda o, field=field: getattr(o, field.name)


ALL_PATHS = [
    (name, option, get)
    for name, options in OPTIONS.items()
    for option, get in path_options(options)
]


def test_path_options_are_found():
    found = {(name, option) for name, option, _ in ALL_PATHS}
    assert {
        ("train", "--out"),
        ("train", "--data.data-dir"),
        ("compare", "--data.data-dir"),
        ("inference", "--models"),
        ("suite", "--out"),
        ("tables", "--data-dir"),
        ("bench", "--out"),
    } <= found
    assert len(found) == 16


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("SCRATCH", str(folder / "scratch"))
        yield folder


def parse(name, args):
    """The options of a command line."""
    has_preset = issubclass(OPTIONS[name], cli.Command)
    function = cli.parse if has_preset else cli.parse_options
    return function(OPTIONS[name], args, name)


@functools.cache
def parsed(name, typed, separate):
    """The options of a command whose paths are all typed alike."""
    args = []
    for command, option, _ in ALL_PATHS:
        if command == name:
            args += [option, typed] if separate else [f"{option}={typed}"]
    return parse(name, args)


@pytest.mark.parametrize(
    ("name", "option", "get"), ALL_PATHS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_paths_are_expanded(name, option, get, home):
    for typed, meant in {
        "~/a b": home / "a b",
        "$HOME/a": home / "a",
        "${SCRATCH}/a": home / "scratch" / "a",
        "~": home,
        "a/~": Path("a/~"),
    }.items():
        for separate in (False, True):
            assert get(parsed(name, typed, separate)) == meant
    for typed, words in {"": "empty", "~nobody-at-all/x": "no user"}.items():
        with pytest.raises(ValueError, match=words):
            parse(name, [option, typed])


def test_a_preset_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "from experiments.config import *\ndef config(): return ImageConfig(seed=9)"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    assert cli.parse(train.Train, ["~/mine.py"], "train").config.seed == 9


def test_a_program_may_give_such_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(data.DataError, match=str(tmp_path / "sets")):
        data.load("cifar10", data_dir="~/sets")
    assert paths.expand(Path("~/x")) == tmp_path / "x"
