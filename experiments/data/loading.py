"""`load`: a data set by name, from wherever it lies."""

import pathlib

from experiments.data import digits, prepared
from experiments.data.dataset import DataError, Dataset


def load(
    name: str,
    *,
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
) -> Dataset:
    """Loads a data set."""
    if name == digits.NAME:
        return digits.load(seed=seed)
    if data_dir is None:
        raise DataError("data_dir=None")
    return prepared.load(name, data_dir=pathlib.Path(data_dir), seed=seed)
