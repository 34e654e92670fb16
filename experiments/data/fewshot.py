"""Sets for few-shot learning: classes of training, validation and test are disjoint.

Omniglot, as TensorFlow Datasets prepares it, and CIFAR-FS: prepared with its own
splits, or regrouped from CIFAR-100.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from experiments.data import images, prepared
from experiments.data.dataset import DataError, channel_statistics
from experiments.data.loading import data_folder

OMNIGLOT, CIFAR_FS = "omniglot", "cifar_fs"
NAMES = (OMNIGLOT, CIFAR_FS)
SIZE = 28  # of Omniglot's images, as few-shot learning has them
VALIDATION_ALPHABETS = 5

# The splits of CIFAR-FS (Bertinetto et al., 2019); the other 64 classes are for
# training.
CIFAR_FS_SPLITS = {
    "validation": {
        "beaver",
        "beetle",
        "butterfly",
        "camel",
        "cattle",
        "crab",
        "crocodile",
        "flatfish",
        "lamp",
        "maple_tree",
        "motorcycle",
        "otter",
        "sea",
        "shark",
        "television",
        "tractor",
    },
    "test": {
        "baby",
        "bed",
        "bicycle",
        "chimpanzee",
        "fox",
        "leopard",
        "man",
        "pickup_truck",
        "plain",
        "poppy",
        "rocket",
        "rose",
        "snail",
        "sweet_pepper",
        "table",
        "telephone",
        "wardrobe",
        "whale",
        "woman",
        "worm",
    },
}


@dataclasses.dataclass(frozen=True)
class FewShotSet:
    """Images by class, in three splits without a class in common.

    Attributes:
      name: The name it was loaded by.
      train: uint8 array `(classes, examples, height, width, channels)`.
      validation: Likewise, for tuning.
      test: Likewise, for the reported number only.
      mean: float32 array `(channels,)`, of the training images in [0, 1].
      std: float32 array `(channels,)`, likewise.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def load_fewshot(
    name: str, *, data_dir: str | None = None, download: bool = False
) -> FewShotSet:
    """Loads a few-shot set into memory, decoded. The last one is kept.

    Omniglot: the background set (30 alphabets) is for training, less five alphabets for
    validation; the evaluation set (20 alphabets) for test. Images are 28 × 28 with ink
    255, and the four rotations of a training character are four classes. CIFAR-FS: the
    published 64 / 16 / 20 classes, from a prepared `cifar_fs…` with splits of its own
    or from `cifar100`.

    Args:
      name: `omniglot` or `cifar_fs`.
      data_dir: The folder of the sets that TFDS prepared.
      download: Whether to download and prepare a set that `data_dir` lacks.

    Returns:
      The set; its arrays are read-only.

    Raises:
      DataError: If the name is unknown, or the folder or the set in it is missing or
        damaged.
    """
    if name not in NAMES:
        raise DataError(f"name={name!r}; accepted are {', '.join(NAMES)}")
    return _load(name, None if data_dir is None else str(data_dir), download)


@functools.lru_cache(maxsize=1)
def _load(name: str, data_dir: str | None, download: bool) -> FewShotSet:
    builder, shape = _opened(name, data_dir, download)
    directory = builder.data_path
    with prepared.reading(directory, name, ", ".join(builder.info.splits)):
        read = _omniglot if name == OMNIGLOT else _cifar_fs
        train, validation, test = read(builder, shape)
    for split in (train, validation, test):
        split.flags.writeable = False
    mean, std = channel_statistics(train.reshape(-1, *train.shape[2:]))
    return FewShotSet(name, train, validation, test, mean, std)


def _opened(name: str, data_dir: str | None, download: bool) -> tuple[Any, Any]:
    """The prepared set that can serve, and the shape of its images."""
    needed = "cifar_fs or cifar100" if name == CIFAR_FS else name
    hint = f"Accepted is a folder with {needed} as TFDS prepares it, or --download"
    folder = data_folder(name, data_dir, create=download, hint=hint)
    directory = _find(name, folder)
    if directory is None and download:
        from experiments.data import builders

        builders.prepare("cifar100" if name == CIFAR_FS else name, data_dir=folder)
        directory = _find(name, folder)
    if directory is None:
        held = ", ".join(prepared.prepared_sets(folder)) or "no prepared set"
        raise DataError(
            f"name={name!r} is not in data_dir={str(folder)!r}, which holds {held}. "
            f"{hint}"
        )
    with prepared.reading(directory, name):
        builder, shape, _ = prepared.open_set(directory, name)
    return builder, shape


def load_alphabets(
    *, data_dir: str | None = None, download: bool = False
) -> list[np.ndarray]:
    """The alphabets of Omniglot's background set, in order of their labels.

    Args:
      data_dir: The folder of the sets that TFDS prepared.
      download: Whether to download and prepare it where `data_dir` lacks it.

    Returns:
      uint8 arrays `(characters, drawings, 28, 28, 1)` with ink 255, read-only.

    Raises:
      DataError: If the folder or the set in it is missing or damaged.
    """
    return list(_alphabets(None if data_dir is None else str(data_dir), download))


@functools.lru_cache(maxsize=1)
def _alphabets(data_dir: str | None, download: bool) -> tuple[np.ndarray, ...]:
    builder, shape = _opened(OMNIGLOT, data_dir, download)
    parts: dict[int, list] = {}
    with prepared.reading(builder.data_path, OMNIGLOT, "train"):
        for example in prepared.examples(builder, "train"):
            parts.setdefault(int(example["alphabet"]), []).append(example)
        pixels = functools.partial(_drawing, (*shape[:2], 1))
        found = tuple(by_class(parts[label], pixels) for label in sorted(parts))
    for alphabet in found:
        alphabet.flags.writeable = False
    return found


def _find(name: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The folder of a prepared set that can serve."""
    held = prepared.prepared_sets(folder)
    wanted = [name]
    if name == CIFAR_FS:
        wanted += [key for key in held if key.startswith(CIFAR_FS)] + ["cifar100"]
    return next((held[key] for key in wanted if key in held), None)


def _drawing(grey: tuple[int, ...], example: dict[str, Any]) -> np.ndarray:
    """A character, small, with ink 255."""
    drawing = Image.fromarray(images.decode(example["image"], grey)[..., 0])
    small = drawing.resize((SIZE, SIZE), Image.Resampling.BOX)
    return 255 - np.asarray(small)[..., None]


def _omniglot(builder: Any, shape: tuple[int, ...]) -> tuple:
    """Training, validation and test classes of Omniglot."""
    pixels = functools.partial(_drawing, (*shape[:2], 1))
    background = list(prepared.examples(builder, "train"))
    alphabets = sorted({int(example["alphabet"]) for example in background})
    held = np.random.default_rng(0).permutation(alphabets)[:VALIDATION_ALPHABETS]
    parts: dict[bool, list] = {False: [], True: []}
    for example in background:
        parts[int(example["alphabet"]) in held].append(example)
    train = by_class(parts[False], pixels)
    rotated = [np.rot90(train, turns, axes=(2, 3)) for turns in range(4)]
    return (
        np.concatenate(rotated),
        by_class(parts[True], pixels),
        by_class(prepared.examples(builder, "test"), pixels),
    )


def _cifar_fs(builder: Any, shape: tuple[int, ...]) -> tuple:
    """Training, validation and test classes of CIFAR-FS."""
    pixels = lambda example: images.decode(example["image"], shape)
    splits = {key: list(prepared.examples(builder, key)) for key in builder.info.splits}
    if "val" in splits or "validation" in splits:
        validation = splits.get("val") or splits["validation"]
        chosen = [splits["train"], validation, splits["test"]]
    else:
        names = builder.info.features["label"].names
        held = set().union(*CIFAR_FS_SPLITS.values())
        if len(names) != 100 or not held <= set(names):
            raise DataError(
                f"name={CIFAR_FS!r}: {builder.data_path} does not have the 100 classes "
                "of CIFAR-100"
            )
        chosen = [[], [], []]
        for example in (example for split in splits.values() for example in split):
            label = names[example["label"]]
            kind = [label in CIFAR_FS_SPLITS[key] for key in ("validation", "test")]
            chosen[kind.index(True) + 1 if any(kind) else 0].append(example)
    return tuple(by_class(split, pixels) for split in chosen)


def by_class(examples: Iterable[dict[str, Any]], pixels: Any) -> np.ndarray:
    """Examples as one array, by class.

    Args:
      examples: Each with a `label`.
      pixels: From an example to its uint8 image.

    Returns:
      uint8 array `(classes, examples, height, width, channels)`, in order of the
      labels. A class gives as many examples as the smallest.

    Example:
      >>> image = lambda example: np.full((1, 1, 1), example["value"], np.uint8)
      >>> rows = [(7, 1), (3, 2), (7, 3), (3, 4), (7, 5)]
      >>> examples = [{"label": label, "value": value} for label, value in rows]
      >>> by_class(examples, image)[..., 0, 0, 0]
      array([[2, 4],
             [1, 3]], dtype=uint8)
    """
    classes: dict[int, list[np.ndarray]] = {}
    for example in examples:
        classes.setdefault(int(example["label"]), []).append(pixels(example))
    if not classes:
        raise DataError("a split has no examples")
    number = min(map(len, classes.values()))
    return np.stack([np.stack(classes[label][:number]) for label in sorted(classes)])
