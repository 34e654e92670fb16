"""Measures the two theory claims: `python -m experiments.theory sde|pac_bayes`."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.progress import Progress

from experiments import cli, process
from experiments.bench import report
from experiments.theory import certificates, record, stochastic
from experiments.theory.certificates import PacBayesConfig
from experiments.theory.stochastic import SdeConfig

PROG = "experiments.theory"


@dataclasses.dataclass(frozen=True)
class Options:
    """Prints the tables of one claim; writes them as JSON, with plots beside it."""

    name: Annotated[Literal["sde", "pac_bayes"], tyro.conf.Positional] = "sde"
    """Which: the stochastic differential equation, or the PAC-Bayes bound."""

    sde: SdeConfig = dataclasses.field(default_factory=SdeConfig)
    pac_bayes: PacBayesConfig = dataclasses.field(default_factory=PacBayesConfig)

    out: pathlib.Path | None = None
    """The JSON file; by default runs/theory-NAME.json."""


@process.runs_experiments
def main(args: Sequence[str] | None = None) -> None:
    """Runs one of them; exits with code 2 on a user's error."""
    args = list(sys.argv[1:] if args is None else args)
    console = cli.console(wide=True)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        path = options.out or pathlib.Path("runs") / f"theory-{options.name}.json"
        record.check_out(path)
        part: Any = certificates if options.name == "pac_bayes" else stochastic
        config = getattr(options, options.name)
        run: Callable[[Any, Progress], dict[str, Any]] = part.run
        head = record.provenance(args, record.as_json(config))
        with cli.progress_bar(console) as progress:
            result = head | run(config, progress)
    result["tables"] = tables = part.tables(result)
    report.show(tables, console, None)
    files = record.write(path, result, part.panels(result), tables)
    console.print(f"Written to {', '.join(map(str, files))}", soft_wrap=True)


if __name__ == "__main__":
    main()
