"""Every command, by its name, and the line that it ends a mistake with."""

import pytest

from experiments import compare, inference, ranks, rates, render, suite, tables, train
from experiments.bench import __main__ as bench

OPTIONS = {
    "train": train.Train,
    "compare": compare.Compare,
    "inference": inference.Inference,
    "ranks": ranks.Ranks,
    "rates": rates.Rates,
    "suite": suite.Options,
    "tables": tables.Options,
    "render": render.Options,
    "bench": bench.Options,
}
MAIN = {
    "train": train.main,
    "compare": compare.main,
    "inference": inference.main,
    "ranks": ranks.main,
    "rates": rates.main,
    "suite": suite.main,
    "tables": tables.main,
    "render": render.main,
    "bench": bench.main,
}


def fails(name, args, capsys, code=2):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as exit_:
        MAIN[name](args)
    assert exit_.value.code == code
    output = capsys.readouterr()
    if code == 2:
        assert output.out == ""
    assert output.err.count("\n") == 1
    start = f"experiments.{name}: error: "
    assert output.err.startswith(start)
    return output.err.removeprefix(start)
