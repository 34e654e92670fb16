"""Sets prepared by TensorFlow Datasets in the array_record format.

They are read through TFDS without TensorFlow, in batches of records, and decoded
straight into one array per split.
"""

import pathlib

import numpy as np

from experiments.data.dataset import DataError, Dataset, Split, make_dataset

_BATCH = 1024


def prepared_sets(data_dir: pathlib.Path) -> list[str]:
    """The names of the sets that a folder holds, `name/config` where configured."""
    versions = (
        path.parent.parent
        for pattern in ("*/*/features.json", "*/*/*/features.json")
        for path in data_dir.glob(pattern)
    )
    return sorted({version.relative_to(data_dir).as_posix() for version in versions})


def load(name: str, *, data_dir: pathlib.Path, seed: int) -> Dataset:
    """Reads a prepared image classification set.

    Splits are called `train`, `test` and, if any, `validation` or `val`. Where
    the publishers label no test split, their validation split is the test split
    and another one is held out of train.

    Args:
      name: A name that `prepared_sets` gives.
      data_dir: The folder that TFDS prepared it in.
      seed: Chooses the examples held out, where there is no validation split.

    Returns:
      The data set, under the last part of its name.

    Raises:
      DataError: If a file is missing or damaged, or the set is none for image
        classification with uint8 images of one shape.
    """
    import tensorflow_datasets as tfds

    where = f"name={name!r}: in data_dir={str(data_dir)!r}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        info = builder.info
        features, names = info.features, list(info.splits)
    except Exception as error:  # TFDS raises what its parsers raise.
        raise DataError(f"{where} the metadata is damaged: {_line(error)}") from error
    shape, num_classes = _image_classification(tfds, features, where)

    def read(*accepted: str) -> Split | None:
        found = [split for split in accepted if split in names]
        return _read(builder, found[0], shape, where) if found else None

    train, validation = read("train"), read("validation", "val")
    test = read("test")
    if test is None:
        test, validation = validation, None
    if train is None or test is None:
        raise DataError(
            f"{where} there are the splits {', '.join(names) or 'none'}; needed are "
            "train and one of test, validation, val"
        )
    return make_dataset(
        name.rsplit("/")[-1],
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        seed=seed,
    )


def _image_classification(tfds, features, where: str) -> tuple[tuple[int, ...], int]:
    """The image shape and number of classes that the features promise."""
    image, label = (
        features[key] if key in features.keys() else None  # noqa: SIM118
        for key in ("image", "label")
    )
    if not (
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and image.np_dtype == np.uint8
        and None not in image.shape
    ):
        raise DataError(
            f"{where} the features are {features!r}; accepted are a uint8 `image` of "
            "known shape and a `label`".replace("\n", " ")
        )
    return image.shape, label.num_classes


def _read(builder, split: str, shape: tuple[int, ...], where: str) -> Split:
    """Decodes one split into one array."""
    try:
        source = builder.as_data_source(split)
        images = np.empty((len(source), *shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        for start in range(0, len(source), _BATCH):
            indices = range(start, min(start + _BATCH, len(source)))
            for index, example in zip(
                indices, source.__getitems__(list(indices)), strict=True
            ):
                images[index], labels[index] = example["image"], example["label"]
    except Exception as error:  # The record reader raises RuntimeError and others.
        raise DataError(
            f"{where} the split {split!r} cannot be read: {_line(error)}"
        ) from error
    return Split(images, labels)


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
