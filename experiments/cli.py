"""The command line: a preset, options over it, and errors of one line.

`parse` reads a dataclass with a field `preset` and a field `config`. The preset
gives the config that the options override. Whatever a user can get wrong ends in
`fail`: one line on stderr and exit code 2.
"""

import contextlib
import dataclasses
import importlib.util
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

import tyro

from experiments import checks
from experiments.config import Config

PRESETS = Path(__file__).resolve().parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class Command:
    """What every command has: a preset, and the config that comes of it."""

    presets: ClassVar[Path] = PRESETS

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET]")] = (
        "digits"
    )
    """A file of configs/ by name, or the path of another such file."""

    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Config
    )


AnyCommand = TypeVar("AnyCommand", bound=Command)


def preset_names(folder: Path = PRESETS) -> list[str]:
    """The presets of a folder, in alphabetical order."""
    return sorted(path.stem for path in folder.glob("[!_]*.py"))


def load_preset(name: str, folder: Path = PRESETS) -> Any:
    """Runs the function `config` of a preset.

    Args:
      name: The name of a file of the folder, or a path that ends in `.py`.
      folder: The folder of the presets.

    Returns:
      The config.

    Raises:
      ValueError: If there is no such preset.
    """
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        checks.one_of("PRESET", name, preset_names(folder))
        path = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config()


def parse(command: type[AnyCommand], args: Sequence[str], prog: str) -> AnyCommand:
    """Parses a command line; the defaults are those of its preset.

    Args:
      command: A subclass of `Command`; its docstring is the description.
      args: The arguments, without the name of the program.
      prog: The name of the program.

    Returns:
      The command.

    Raises:
      ValueError: If an argument is not accepted.
      SystemExit: After `--help`.
    """
    wants_help = any(arg in ("-h", "--help") for arg in args)
    quiet = [arg for arg in args if arg not in ("-h", "--help")]
    # Once for the preset alone, whose config then becomes the default.
    preset = _parse(command, quiet, prog, command()).preset
    config = load_preset(preset, command.presets)
    default = dataclasses.replace(command(), preset=preset, config=config)
    return _parse(command, args if wants_help else quiet, prog, default)


def parse_over(
    command: type[AnyCommand], args: Sequence[str], prog: str, config: Any
) -> AnyCommand:
    """Parses a command line over a given config instead of the preset's."""
    return _parse(command, args, prog, dataclasses.replace(command(), config=config))


def _parse(
    command: type[AnyCommand], args: Sequence[str], prog: str, default: AnyCommand
) -> AnyCommand:
    """One call of tyro, with its boxed messages turned into a `ValueError`."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(command, args=args, prog=prog, default=default)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise ValueError(one_line(errors.getvalue())) from None


def one_line(boxed: str) -> str:
    """The message in tyro's box, on one line, with the options it suggests.

    Example:
      >>> one_line('''
      ... ╭─ Unrecognized options ─────╮
      ... │ Unrecognized options: --ep │
      ... │ ────────────────────────── │
      ... │ Perhaps you meant:         │
      ... │     --epochs INT           │
      ... │         Passes.            │
      ... ╰────────────────────────────╯''')
      'Unrecognized options: --ep (accepted: --epochs INT)'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    has_frame = "╭" in plain
    sections: list[list[str]] = [[]]
    for line in plain.splitlines():
        if re.fullmatch(r"[│\s]*[─-]{5,}[│\s]*", line):
            sections.append([])
        elif text := line.strip("│ ") if line[:1] not in ("╭", "╰") else "":
            sections[-1].append(text)
    # Without a frame, where the terminal is no UTF-8, the title is a section.
    sections = sections if has_frame else sections[1:]
    message = " ".join(sections[0])
    message = re.sub(r"^Error parsing (config\S*: )?", "", message)
    options = [
        text for section in sections[1:] for text in section if text.startswith("-")
    ]
    return message + (f" (accepted: {', '.join(options)})" if options else "")


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Ends the program with one line where a `ValueError` says what was wrong."""
    try:
        yield
    except ValueError as error:
        fail(prog, error)


def fail(prog: str, error: Exception | str, code: int = 2) -> NoReturn:
    """Prints an error on one line of stderr and exits."""
    message = " ".join(str(error).split())
    print(f"{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(code) from None
