"""Tiny ImageNet, read from the publishers' zip file.

200 classes of 64 x 64 JPEG images: 500 a class to train, 50 to validate. The
labels of the official test images were never published, so the validation images
serve as the test split, as usual.
"""

import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.data.dataset import DataError, Dataset, Split, make_dataset
from experiments.data.images import decode, first_line

NAME = "tiny_imagenet"
NUM_CLASSES = 200
SHAPE = (64, 64, 3)
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
PATTERN = "tiny-imagenet-200*.zip"

_ROOT = "tiny-imagenet-200/"


class Example(NamedTuple):
    """One image of the archive."""

    filename: str
    data: bytes
    label: int


def load(path: pathlib.Path, *, seed: int) -> Dataset:
    """Loads the set from the publishers' file, or from a part of it.

    Args:
      path: The zip file.
      seed: Chooses the tenth of the training images held out for validation.

    Returns:
      The data set; its test split holds the official validation images.

    Raises:
      DataError: If the file or an image in it is damaged, or a list is missing.
    """
    train, test = (_decoded(path, split) for split in ("train", "validation"))
    return make_dataset(
        NAME,
        train=train,
        validation=None,
        test=test,
        num_classes=NUM_CLASSES,
        seed=seed,
    )


def read(path: pathlib.Path, split: str) -> Iterator[Example]:
    """Reads one split, image by image, in order of the file names.

    Args:
      path: The zip file.
      split: `train` or `validation`.

    Yields:
      File name, encoded image and label: the index among the sorted class names.

    Raises:
      DataError: If the file is damaged or a list in it is missing or wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            labels = _labels(archive)
            names = _train(archive) if split == "train" else _validation(archive)
            for name, wnid in sorted(names.items()):
                yield Example(name, archive.read(_ROOT + name), labels[wnid])
    except KeyError as error:
        raise DataError(
            f"name={NAME!r}: {path} lacks {error.args[0]!r} in the layout of the "
            f"publishers' {_ROOT.strip('/')}.zip"
        ) from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"name={NAME!r}: {path} is not a whole zip file ({first_line(error)})"
        ) from error


def _decoded(path: pathlib.Path, split: str) -> Split:
    """One split as arrays."""
    pixels, labels = [], []
    for example in read(path, split):
        try:
            pixels.append(decode(example.data, SHAPE))
        except ValueError as error:
            raise DataError(
                f"name={NAME!r}: {path} has in {example.filename} a {error}"
            ) from error
        labels.append(example.label)
    if not pixels:
        raise DataError(f"name={NAME!r}: {path} has no {split} images")
    return Split(np.stack(pixels), np.asarray(labels, np.int32))


def _labels(archive: zipfile.ZipFile) -> dict[str, int]:
    """From class name to label."""
    wnids = sorted(archive.read(f"{_ROOT}wnids.txt").decode().split())
    if len(set(wnids)) != NUM_CLASSES:
        raise DataError(
            f"name={NAME!r}: {archive.filename} lists {len(set(wnids))} classes in "
            f"wnids.txt; accepted are {NUM_CLASSES}"
        )
    return {wnid: label for label, wnid in enumerate(wnids)}


def _train(archive: zipfile.ZipFile) -> dict[str, str]:
    """From file name to class name; the folder is the class."""
    names = (name.removeprefix(_ROOT) for name in archive.namelist())
    return {
        name: name.split("/")[1]
        for name in names
        if name.startswith("train/") and name.endswith(".JPEG")
    }


def _validation(archive: zipfile.ZipFile) -> dict[str, str]:
    """From file name to class name; a list gives the class."""
    lines = archive.read(f"{_ROOT}val/val_annotations.txt").decode().splitlines()
    fields = (line.split("\t") for line in lines if line)
    return {f"val/images/{name}": wnid for name, wnid, *_ in fields}
