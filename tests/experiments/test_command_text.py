"""Commands read and show text in any locale."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
from experiments import train
from experiments.study import runs
from tests.experiments.commands import MAIN, OPTIONS
from tests.experiments.small_runs import SMALL, SMALL_FEWSHOT

SOURCES = sorted(Path(experiments.__file__).parent.rglob("*.py"))
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def text_without_encoding(source):
    """The lines of calls that open a file as text in the encoding of the locale."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        text = name in ("read_text", "write_text", "TextIOWrapper")
        owner = getattr(getattr(call.func, "value", None), "id", None)
        if name in ("open", "fdopen") and owner != "Image":
            path_first = owner in (None, "io", "os")
            mode = given.get("mode", (call.args + [None] * 2)[path_first])
            text = mode is None or "b" not in ast.literal_eval(mode)
        if name in ("run", "Popen", "check_output") and owner == "subprocess":
            text = bool({"text", "universal_newlines"} & set(given))
        if text and "encoding" not in given:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_text_file_has_an_encoding(path):
    assert text_without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "open(p)",
        "open(p, 'w')",
        "p.open('a')",
        "p.open(mode='a')",
        "p.read_text()",
        "p.write_text(t)",
        "io.open(p)",
        "subprocess.run(c, text=True)",
    ],
)
def test_what_is_no_encoding_is_found(source):
    assert text_without_encoding(source) == [1]
    comma = "" if source.endswith("()") else ", "
    with_encoding = source.removesuffix(")") + comma + "encoding='utf-8')"
    assert text_without_encoding(with_encoding) == []
    assert text_without_encoding("p.open('rb'); open(p, 'wb'); Image.open(b)") == []


@pytest.fixture
def screen(monkeypatch):
    """Replaces stdout by a terminal of an encoding; what it shows is returned."""

    def replace(encoding):
        buffer = io.BytesIO()
        stream = io.TextIOWrapper(buffer, encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        return lambda: buffer.getvalue().decode(encoding)

    return replace


def test_a_run_ends_where_the_screen_lacks_its_characters(screen, tmp_path):
    shown = screen("cp1252")  # which has ±, and no →
    train.main([*SMALL_FEWSHOT, "--out", str(tmp_path)])
    assert "±" in shown()
    assert " ? " in shown()


@pytest.mark.parametrize("name", OPTIONS)
def test_help_is_shown_on_any_screen(name, screen):
    shown = screen("ascii")
    with pytest.raises(SystemExit) as exit_:
        MAIN[name](["--help"])
    assert exit_.value.code in (0, None)
    assert ("--check" if name == "render" else "--out") in shown()


def test_names_are_shown_as_they_are(tmp_path, capsys):
    args = [*SMALL, "--epochs", "1", "--optimizer", "sgd"]
    train.main([*args, "--out", str(tmp_path / "[red]a["), "--name", "b]:bug:"])
    assert "[red]a[/b]:bug:/report.html" in capsys.readouterr().out


# To import the libraries once takes as long as a run.
TWO_RUNS = """
import sys
from experiments.train import main
first, second, *args = sys.argv[1:]
main([*args, "--name", first])
print("the first has ended")
main([*args, "--name", second])
"""


@pytest.mark.slow
def test_a_run_in_a_locale_of_ascii(tmp_path):
    args = [*SMALL, "--epochs", "1", "--probe.batch-size", "32"]
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, "a", "ä", *args, "--out", str(tmp_path)],
        env=os.environ | ASCII,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert "the first has ended" in done.stdout, done.stderr
    text = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    assert not text.isascii()
    # A name that the locale cannot decode can be the name of no checkpoint.
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "PYTHONUTF8=1" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_metrics_that_are_no_text_are_cut_off(tmp_path):
    run = runs.Run(tmp_path, None, "digits")
    run.log({"step": 0, "note": "κ"})
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step": \xff\xfe\n')
    assert run.records() == [{"step": 0, "note": "κ"}]
