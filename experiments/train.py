"""Trains a classifier: `python -m experiments.train [PRESET] [--options]`."""

import dataclasses
from collections.abc import Sequence

from experiments import data, process
from experiments.command import RunCommand, run_command
from experiments.config import DataConfig
from experiments.loop import make_trainer, run_experiment
from experiments.report import closing_table, write_report

PROG = "experiments.train"


@dataclasses.dataclass(frozen=True)
class Train(RunCommand):
    """Trains a classifier from a preset, with any option of it replaced.

    Writes the folder OUT/NAME with config.json, metrics.jsonl, checkpoints/ and
    report.html, and prints a table.
    """


@process.keeps_memory
@process.keeps_programs
@process.single_threaded_lapack
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 on divergence."""
    prepare = lambda config: make_trainer(load_data(config.data), config)
    run_command(
        Train,
        PROG,
        args,
        prepare=prepare,
        execute=run_experiment,
        write_report=write_report,
        closing_table=closing_table,
    )


def load_data(config: DataConfig) -> data.Dataset:
    """Loads the data set that a config names."""
    dataset = data.load(
        config.name,
        data_dir=config.data_dir,
        download=config.download,
        seed=config.split_seed,
    )
    return data.with_label_noise(dataset, config.label_noise, seed=config.split_seed)


if __name__ == "__main__":
    main()
