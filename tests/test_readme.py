"""The README is the door: short, and its Python blocks run in one namespace."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_blocks():
    """What stands in a block of its own after one that prints is what it prints."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```\n(.*?)```)?", text, re.DOTALL)
    assert blocks
    namespace = {"__name__": "readme"}
    shown = 0
    for block, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(README), "exec"), namespace)
        if expected:
            strip = lambda text: [line.rstrip() for line in text.splitlines()]
            assert strip(printed.getvalue()) == strip(expected)
            shown += 1
    assert shown


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_it_has_no_number_of_its_own():
    """Results are read from files; what is left are versions and a reference."""
    text = README.read_text(encoding="utf-8")
    for pattern in (
        r"```.*?```",
        r"<!-- (headlines|claims) -->.*?<!-- end -->",
        r"`[^`]*`",
        r"\]\([^)]*\)",
        r"jax 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1",
        r"95 % intervals",
        r"arXiv 2505.23369|Apache-2.0|jax \(0.10 to 0.12\)",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+|\d+ ?%", text)
