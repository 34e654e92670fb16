"""The command line: a preset, options over it, and errors of one line.

`parse` reads a dataclass that has a field `config` besides its own; the first argument
may be a preset, which gives the config that the options override. Whatever a user can
get wrong ends in `fail`: one line on stderr and exit code 2. Every option that is a
path is expanded (`experiments.paths`), and what the terminal cannot show is replaced
(`console`).
"""

import contextlib
import dataclasses
import importlib.util
import io
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from experiments import checks, paths
from experiments.study.config import Config

PRESETS = Path(__file__).resolve().parent.parent / "configs"
TABLES = PRESETS / "tables"


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command of a preset has.

    Attributes:
      preset: The preset.
      config: What comes of it.
    """

    preset: tyro.conf.Suppress[str] = "digits"
    config: tyro.conf.Suppress[Config | None] = None


AnyCommand = TypeVar("AnyCommand", bound=Command)
AnyOptions = TypeVar("AnyOptions")

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _path(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """How every option of type `Path` is read."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: paths.expand(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def preset_names(folder: Path = PRESETS) -> list[str]:
    """The presets of a folder, in alphabetical order."""
    return sorted(path.stem for path in folder.glob("[!_]*.py"))


def load_preset(
    name: str,
    folder: Path = PRESETS,
    *args: Any,
    function: str = "config",
    what: str = "PRESET",
) -> Any:
    """The function of a file that gives a config, called.

    Args:
      name: The name of a file of the folder, or a path that ends in `.py`.
      folder: The folder of such files.
      *args: Given to the function.
      function: Its name.
      what: What such a file is called in errors.

    Returns:
      What it gives.

    Raises:
      ValueError: If there is no such file, or it gives nothing.
    """
    path = paths.expand(name)
    if path.suffix != ".py" or not path.is_file():
        checks.one_of(what, name, preset_names(folder))
        path = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)(*args)
    except Exception as error:  # It is a program, which may do anything.
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(
            f"{what}={name!r}{where}; accepted is a file with a function {function}() "
            f"that gives a config, but this raises {type(error).__name__}: {error}"
        ) from error


def load_table(name: str, scale: str) -> Any:
    """The `Table` that a file of `TABLES` declares, for one of its scales.

    Args:
      name: Of the file, or its path.
      scale: Given to its function.

    Returns:
      The table; a declaration may change what another one gives.

    Raises:
      ValueError: As `load_preset`.
    """
    return load_preset(name, TABLES, scale, function="table", what="NAME")


def parse(command: type[AnyCommand], args: Sequence[str], prog: str) -> AnyCommand:
    """Parses a command line; the defaults are those of its preset.

    Args:
      command: A subclass of `Command`; its docstring is the description.
      args: The arguments, without the name of the program; the preset comes first.
      prog: The name of the program.

    Returns:
      The command.

    Raises:
      ValueError: If an argument is not accepted.
      SystemExit: After `--help`.
    """
    given = bool(args) and not args[0].startswith("-")
    preset = args[0] if given else command().preset
    config = load_preset(preset)
    if not isinstance(config, Config):
        raise ValueError(
            f"PRESET={preset!r} gives a {type(config).__name__}; accepted are presets "
            "of a Config"
        )
    return parse_over(command, args[given:], prog, config, preset)


def parse_over(
    command: type[AnyCommand],
    args: Sequence[str],
    prog: str,
    config: Config,
    preset: str,
) -> AnyCommand:
    """Parses options over a given config."""
    hint = Annotated[type(config), tyro.conf.arg(name="")]
    options = dataclasses.make_dataclass(
        command.__name__,
        [("config", hint, dataclasses.field(default=config))],
        bases=(command,),
        frozen=True,
        namespace={"__doc__": command.__doc__},
    )
    return parse_options(
        options, args, f"{prog} [PRESET]", options(preset=preset, config=config)
    )


def parse_options(
    options: type[AnyOptions],
    args: Sequence[str],
    prog: str,
    default: AnyOptions | None = None,
) -> AnyOptions:
    """Parses the options that a dataclass has.

    Args:
      options: The dataclass; its docstring is the description.
      args: The arguments, without the name of the program.
      prog: The name of the program.
      default: What is not given; by default what the dataclass says.

    Returns:
      The options.

    Raises:
      ValueError: If an argument is not accepted.
      SystemExit: After `--help`.
    """
    default = options() if default is None else default
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                options, args=args, prog=prog, default=default, registry=REGISTRY
            )
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
    message = re.sub(r"^Error parsing ((config\S*|[A-Z]\w*): )?", "", message)
    message = re.sub(r"^(\w+): (?=\1\.)", "", message)  # said twice
    options = [
        text for section in sections[1:] for text in section if text.startswith("-")
    ]
    return message + (f" (accepted: {', '.join(options)})" if options else "")


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Ends the program with one line where an error says what was wrong.

    That is a `ValueError`, or what the system says of a file or a folder.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(prog, error)


def console(*, wide: bool = False) -> Console:
    """The console of a command; from here on no character ends it with an error.

    Args:
      wide: Whether a file, which has room for every column, gets 160 of them.

    Returns:
      The console. It takes text as it is: names and paths may hold brackets.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else it is no text in some encoding
            stream.reconfigure(errors="replace")
    result = Console(highlight=False, markup=False, emoji=False)
    if wide and not result.is_terminal:
        result.width = 160
    return result


def fail(prog: str, error: Exception | str, code: int = 2) -> NoReturn:
    """Prints an error on one line of stderr and exits."""
    message = " ".join(str(error).split())
    print(f"{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def progress_bar(console: Console) -> Progress:
    """A progress bar where someone is looking, and nothing where not."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
