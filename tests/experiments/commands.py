"""Every command, by its name, and the line that it ends a mistake with."""

import pytest

from experiments import compare, train
from experiments.bench import __main__ as bench
from experiments.fewshot import __main__ as fewshot, compare as fewshot_compare

OPTIONS = {
    "train": train.Train,
    "compare": compare.Compare,
    "fewshot": fewshot.Fewshot,
    "fewshot.compare": fewshot_compare.Compare,
    "bench": bench.Options,
}
MAIN = {
    "train": train.main,
    "compare": compare.main,
    "fewshot": fewshot.main,
    "fewshot.compare": fewshot_compare.main,
    "bench": bench.main,
}


def fails(name, args, capsys):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as exit_:
        MAIN[name](args)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    start = f"experiments.{name}: error: "
    assert output.err.startswith(start)
    return output.err.removeprefix(start)
