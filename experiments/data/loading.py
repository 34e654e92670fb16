"""`load`: a data set by name, from wherever it lies."""

import functools
import pathlib

from experiments import paths
from experiments.data import digits, medmnist, prepared, tiny_imagenet
from experiments.data.dataset import DataError, Dataset, find_raw

RAW_FILES = {name: spec.filename for name, spec in medmnist.SETS.items()} | {
    tiny_imagenet.NAME: tiny_imagenet.PATTERN
}
"""The sets that are read from the publishers' own file, and what it is called."""


def load(
    name: str,
    *,
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
) -> Dataset:
    """Loads a data set into memory, decoded.

    A set is looked for in this order: prepared by TensorFlow Datasets in
    `data_dir`; as the publishers' file in `data_dir` (`<name>.npz` of MedMNIST,
    `tiny-imagenet-200*.zip`); and, with `download`, at the publishers'. The last
    set is kept, so its arrays are read-only.

    Args:
      name: `digits`, a set of MedMNIST (`breastmnist`, ...), `tiny_imagenet`, or
        the name of a set that `data_dir` holds (`fashion_mnist`, `cifar10`, ...;
        `name/config` where it has configurations).
      data_dir: The folder with the files of the set. `digits` needs none.
      download: Whether to download and prepare a set that `data_dir` lacks. Some
        builders of TFDS need TensorFlow for that (the `prepare` extra).
      seed: Chooses the validation examples where there is no official split. The
        test split does not depend on it.

    Returns:
      The data set.

    Raises:
      DataError: If the name is unknown, the folder or the set in it is missing,
        or a file is damaged; the message says what would be accepted.

    Example:
      >>> digits = load("digits")
      >>> digits.train.images.shape, len(digits.validation), len(digits.test)
      ((1257, 8, 8, 1), 180, 360)
    """
    return _load(name, None if data_dir is None else str(data_dir), download, seed)


@functools.lru_cache(maxsize=1)
def _load(name: str, data_dir: str | None, download: bool, seed: int) -> Dataset:
    """`load` with hashable arguments."""
    dataset = _find(name, data_dir, download, seed)
    for split in (dataset.train, dataset.validation, dataset.test):
        split.images.flags.writeable = False
        split.labels.flags.writeable = False
    return dataset


def _find(name: str, data_dir: str | None, download: bool, seed: int) -> Dataset:
    """Finds out where a set lies and loads it from there."""
    if name == digits.NAME:
        return digits.load(seed=seed)
    if name in medmnist.REFUSED:
        raise DataError(f"name={name!r} is refused: {medmnist.REFUSED[name]}")
    folder = data_folder(name, data_dir, create=download)
    if (dataset := _prepared(name, folder, seed)) is not None:
        return dataset
    if name in RAW_FILES and (path := find_raw(folder, RAW_FILES[name])):
        if name == tiny_imagenet.NAME:
            return tiny_imagenet.load(path, seed=seed)
        return medmnist.load(path, name=name)
    if download:
        from experiments.data import builders  # Registers them with TFDS.

        builders.prepare(name, data_dir=folder)
        if (dataset := _prepared(name, folder, seed)) is not None:
            return dataset
    raise DataError(
        f"name={name!r} is not in data_dir={str(folder)!r}, which holds "
        f"{', '.join(_held(folder)) or 'no prepared set'}. {_accepted()}"
    )


def data_folder(
    name: str, data_dir: str | None, *, create: bool, hint: str | None = None
) -> pathlib.Path:
    """The data folder, which must exist or be created; `hint` says what it may hold."""
    if data_dir is None:
        raise DataError(
            f"data_dir=None, but name={name!r} needs the folder of its files "
            f"(--data-dir). {hint or _accepted()}"
        )
    try:
        folder = paths.expand(data_dir)
        if create and not folder.exists():
            folder.mkdir(parents=True)
    except (ValueError, OSError) as error:
        raise DataError(f"data_dir={data_dir!r}: {error}") from None
    if not folder.is_dir():
        raise DataError(
            f"data_dir={str(folder)!r} is no folder; accepted is the folder of "
            "prepared sets or of the publishers' files"
        )
    return folder


def _prepared(name: str, folder: pathlib.Path, seed: int) -> Dataset | None:
    """The set as TFDS prepared it, or None."""
    found = prepared.prepared_sets(folder)
    directory = found.get(f"medmnist/{name}" if name in medmnist.SETS else name)
    if directory is None:
        return None
    return prepared.load(directory, name=name, seed=seed)


def _held(folder: pathlib.Path) -> list[str]:
    """The names that a folder can serve."""
    names = (
        found.removeprefix("medmnist/") for found in prepared.prepared_sets(folder)
    )
    raw = (name for name, pattern in RAW_FILES.items() if any(folder.glob(pattern)))
    return sorted({*names, *raw})


def _accepted() -> str:
    """The names, for messages."""
    return (
        f"Accepted are {digits.NAME} (no files), {', '.join(RAW_FILES)} (the "
        "publishers' file, or prepared), and any image classification set that "
        "TensorFlow Datasets prepared (fashion_mnist, cifar10, ...)"
    )
