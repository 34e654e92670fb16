"""Sets prepared by TensorFlow Datasets in the array_record format.

They are read through TFDS without TensorFlow, in batches of records, and decoded
straight into one array per split.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data import images
from experiments.data.dataset import DataError, Dataset, Split, make_dataset

_BATCH = 1024
_VERSION = "[0-9]*.[0-9]*.[0-9]*"


def prepared_sets(data_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """The sets that a folder holds.

    Args:
      data_dir: The folder.

    Returns:
      From name (`name/config` where configured) to the folder of its latest
      version, in order of the names.
    """
    found: dict[str, pathlib.Path] = {}
    for pattern in (f"*/{_VERSION}", f"*/*/{_VERSION}"):
        for version in sorted(data_dir.glob(pattern), key=_version):
            if (version / "dataset_info.json").exists():
                found[version.parent.relative_to(data_dir).as_posix()] = version
    return dict(sorted(found.items()))


def load(directory: pathlib.Path, *, name: str, seed: int) -> Dataset:
    """Loads a prepared set for classification.

    Splits are called `train`, `test` and, if any, `validation` or `val`. Where
    the publishers label no test split, their validation split is the test split
    and another one is held out of train.

    Args:
      directory: The folder of one version, as `prepared_sets` gives it.
      name: The name of the set.
      seed: Chooses the examples held out, where there is no validation split.

    Returns:
      The data set.

    Raises:
      DataError: If a file is missing or damaged, or the set is none for image
        classification with uint8 images of one shape.
    """
    splits, num_classes = read(
        directory, name=name, only=("train", "validation", "val", "test")
    )
    validation = splits.get("validation", splits.get("val"))
    test = splits.get("test")
    if test is None:
        test, validation = validation, None
    if test is None or "train" not in splits:
        raise DataError(
            f"name={name!r}: {directory} has the splits {', '.join(splits) or 'none'};"
            " needed are train and one of test, validation, val"
        )
    return make_dataset(
        name,
        train=splits["train"],
        validation=validation,
        test=test,
        num_classes=num_classes,
        seed=seed,
    )


def read(
    directory: pathlib.Path, *, name: str, only: tuple[str, ...] | None = None
) -> tuple[dict[str, Split], int]:
    """Reads the splits of a prepared set.

    Args:
      directory: The folder of one version, as `prepared_sets` gives it.
      name: The name of the set, for messages.
      only: The splits to read where they exist; by default all.

    Returns:
      The splits by name, and the number of classes.

    Raises:
      DataError: As `load` does.
    """
    with reading(directory, name):
        builder, shape, num_classes = open_set(directory, name)
        wanted = [key for key in builder.info.splits if only is None or key in only]
    splits = {}
    for split in wanted:
        with reading(directory, name, split):
            splits[split] = _read_split(builder, split, shape)
    return splits, num_classes


@contextlib.contextmanager
def reading(
    directory: pathlib.Path, name: str, split: str | None = None
) -> Iterator[None]:
    """Turns what TFDS, its parsers and decoders raise into a `DataError`."""
    what = "damaged metadata" if split is None else f"an unreadable split {split!r}"
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # RuntimeError, and what protobuf raises.
        raise DataError(
            f"name={name!r}: {directory} has {what} ({images.first_line(error)}); "
            "prepare the set again, in the array_record format"
        ) from error


def open_set(directory: pathlib.Path, name: str) -> tuple[Any, tuple[int, ...], int]:
    """The TFDS builder of a prepared set, its image shape and number of classes."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    features = dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    if not (
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and image.np_dtype == np.uint8
        and None not in image.shape
    ):
        raise DataError(
            f"name={name!r}: {directory} has the features {', '.join(features)}; "
            "accepted are sets with a uint8 `image` of known shape and a `label`"
        )
    return builder, image.shape, label.num_classes


def examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split in their order, images still encoded."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=decoders)
    for start in range(0, len(source), _BATCH):
        indices = range(start, min(start + _BATCH, len(source)))
        yield from source.__getitems__(list(indices))


def _read_split(builder: Any, split: str, shape: tuple[int, ...]) -> Split:
    """Decodes one split into one array."""
    number = builder.info.splits[split].num_examples
    pixels = np.empty((number, *shape), np.uint8)
    labels = np.empty(number, np.int32)
    for index, example in enumerate(examples(builder, split)):
        pixels[index] = images.decode(example["image"], shape)
        labels[index] = example["label"]
    return Split(pixels, labels)


def _version(directory: pathlib.Path) -> list[int]:
    """Orders versions by number: 3.10.0 comes after 3.9.0."""
    return [int(part) for part in directory.name.split(".") if part.isdigit()]
