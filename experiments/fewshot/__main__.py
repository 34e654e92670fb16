"""Learns to learn: `python -m experiments.fewshot [PRESET] [--options]`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from experiments import cli, process
from experiments.command import RunCommand, run_command
from experiments.fewshot import report, training
from experiments.fewshot.config import FewshotConfig

PROG = "experiments.fewshot"


@dataclasses.dataclass(frozen=True)
class Fewshot(RunCommand):
    """Meta-learns from a preset of few-shot tasks, with any option of it replaced.

    Writes the folder OUT/NAME with config.json, metrics.jsonl, checkpoints/ and
    report.html, and prints a table.
    """

    presets: ClassVar[Path] = cli.PRESETS / "fewshot"

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET]")] = (
        "sine"
    )
    """A file of configs/fewshot/ by name, or the path of another such file."""

    config: Annotated[FewshotConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=FewshotConfig
    )


@process.keeps_memory
@process.keeps_programs
@process.single_threaded_lapack
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 on divergence."""
    run_command(
        Fewshot,
        PROG,
        args,
        prepare=training.make_learner,
        execute=training.run_experiment,
        write_report=report.write_report,
        closing_table=report.closing_table,
    )


if __name__ == "__main__":
    main()
