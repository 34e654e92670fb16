"""What a data set is here: three splits of uint8 images in memory."""

import dataclasses
import pathlib

import numpy as np


class DataError(ValueError):
    """A data set cannot be loaded; the message says what would be accepted."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
      images: uint8 array of shape `(n, height, width, channels)`.
      labels: int32 array of shape `(n,)`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at `indices`, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification set.

    Attributes:
      name: The name it was loaded by.
      train: The training split.
      validation: For tuning: official where there is one, else held out of train.
      test: For the reported number only.
      num_classes: How many classes there are; labels are below it.
      mean: float32 array `(channels,)`, of the training images in [0, 1].
      std: float32 array `(channels,)`, likewise; 1 for a constant channel.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape `(height, width, channels)` of one image."""
        return self.train.images.shape[1:]


def make_dataset(
    name: str,
    *,
    train: Split,
    validation: Split | None,
    test: Split,
    num_classes: int,
    seed: int,
) -> Dataset:
    """Completes the splits of a set and measures its training images.

    Args:
      name: The name of the set.
      train: The official training split.
      validation: The official validation split. Without one, a class-stratified
        tenth of `train` is held out.
      test: The official test split.
      num_classes: The number of classes.
      seed: Chooses the examples held out.

    Returns:
      The data set.

    Raises:
      DataError: If a split is empty, shapes differ, labels lie outside
        `[0, num_classes)`, or a split for evaluation has a class without
        training examples.
    """
    _check(name, train, [s for s in (validation, test) if s is not None], num_classes)
    if validation is None:
        train, validation = hold_out(train, seed=seed)
    mean, std = channel_statistics(train.images)
    return Dataset(name, train, validation, test, num_classes, mean, std)


def fold(dataset: Dataset, folds: int, number: int, *, seed: int) -> Dataset:
    """A set split anew: one fold of its training and test examples is the test split.

    Folds are stratified by class. Numbers from 0 to `folds − 1` test every example
    once, the next as many do so along other folds, and so on. The validation split
    stays as it is: what is chosen by it was chosen by no test example of any fold.

    Args:
      dataset: The set.
      folds: How many.
      number: Which one.
      seed: Chooses the folds.

    Returns:
      The set.

    Raises:
      DataError: If a class has fewer examples than there are folds.

    Example:
      >>> images, labels = np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 2
      >>> split = Split(images, labels)
      >>> two = Dataset("two", split, split, split, 2, np.zeros(1), np.ones(1))
      >>> part = fold(two, 5, 0, seed=0)
      >>> len(part.train), len(part.validation), len(part.test)
      (64, 40, 16)
    """
    from sklearn.model_selection import StratifiedKFold

    parts = (dataset.train, dataset.test)
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    least = int(np.bincount(labels, minlength=dataset.num_classes).min())
    if not 2 <= folds <= least:
        raise DataError(
            f"folds={folds}; accepted are 2 to {least}, the examples of the class of "
            f"{dataset.name} that has the fewest"
        )
    repeat, place = divmod(number, folds)
    state = int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])
    splitter = StratifiedKFold(folds, shuffle=True, random_state=state)
    train, test = list(splitter.split(labels, labels))[place]
    whole = Split(images, labels)
    return make_dataset(
        dataset.name,
        train=whole.take(train),
        validation=dataset.validation,
        test=whole.take(test),
        num_classes=dataset.num_classes,
        seed=seed,
    )


def with_label_noise(dataset: Dataset, fraction: float, *, seed: int) -> Dataset:
    """A set some of whose training labels are wrong; validation and test are not.

    Args:
      dataset: The set.
      fraction: The share of the training labels that become another class, each of
        the others as likely.
      seed: Chooses the examples and their classes.

    Returns:
      The set; the same one where `fraction` is 0.

    Example:
      >>> images, labels = np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 2
      >>> split = Split(images, labels)
      >>> clean = Dataset("two", split, split, split, 2, np.zeros(1), np.ones(1))
      >>> noisy = with_label_noise(clean, 0.25, seed=0)
      >>> int(np.sum(noisy.train.labels != labels))
      10
    """
    if not fraction:
        return dataset
    rng = np.random.default_rng(seed)
    train = dataset.train
    wrong = rng.choice(len(train), round(fraction * len(train)), replace=False)
    labels = train.labels.copy()
    shift = rng.integers(1, dataset.num_classes, len(wrong))
    labels[wrong] = (labels[wrong] + shift) % dataset.num_classes
    return dataclasses.replace(dataset, train=Split(train.images, labels))


def with_classes(dataset: Dataset, first: int, last: int) -> Dataset:
    """The part of a set that has some of its classes.

    Args:
      dataset: The set.
      first: The first class, label 0 of the part.
      last: The one after its last.

    Returns:
      The part, measured anew.

    Example:
      >>> images, labels = np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 4
      >>> split = Split(images, labels)
      >>> part = with_classes(
      ...     Dataset("four", split, split, split, 4, np.zeros(1), np.ones(1)), 2, 4)
      >>> len(part.train), np.unique(part.train.labels).tolist()
      (20, [0, 1])
    """

    def part(split: Split) -> Split:
        held = split.take((split.labels >= first) & (split.labels < last))
        return Split(held.images, held.labels - first)

    splits = [part(s) for s in (dataset.train, dataset.validation, dataset.test)]
    mean, std = channel_statistics(splits[0].images)
    name = f"{dataset.name}[{first}:{last}]"
    return Dataset(name, *splits, last - first, mean, std)


def few(split: Split, count: int, *, seed: int) -> Split:
    """So many examples of a split, of each class as many, up to one.

    Args:
      split: The examples.
      count: How many.
      seed: Chooses them.

    Returns:
      The examples.

    Raises:
      DataError: If they are fewer than classes, or more than there are.

    Example:
      >>> split = Split(np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 3)
      >>> np.bincount(few(split, 7, seed=0).labels).tolist()
      [3, 2, 2]
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(split.labels == c) for c in np.unique(split.labels)]
    if not len(groups) <= count <= len(split):
        raise DataError(
            f"labels={count}; accepted are {len(groups)} (of each class one) to "
            f"{len(split)}, the training examples"
        )
    ranks = np.concatenate([np.arange(len(group)) for group in groups])
    members = np.concatenate([rng.permutation(group) for group in groups])
    return split.take(members[np.argsort(ranks, kind="stable")[:count]])


def hold_out(split: Split, *, seed: int, fraction: float = 0.1) -> tuple[Split, Split]:
    """Splits off a class-stratified part, the same for the same seed.

    Of a class with n examples, `round(fraction * n)` are held out, at least one
    where n > 1. Both parts keep the order of the original.

    Args:
      split: The split to divide.
      seed: Chooses the examples.
      fraction: The part of each class to hold out.

    Returns:
      What remains, and what is held out.

    Example:
      >>> images, labels = np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 2
      >>> rest, held = hold_out(Split(images, labels), seed=0)
      >>> len(rest), np.bincount(held.labels)
      (36, array([2, 2]))
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(split), bool)
    for label in np.unique(split.labels):
        (members,) = np.nonzero(split.labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[rng.permutation(members)[:count]] = True
    return split.take(np.flatnonzero(~held)), split.take(np.flatnonzero(held))


def find_raw(folder: pathlib.Path, pattern: str) -> pathlib.Path | None:
    """The publishers' file in a folder, or None.

    Args:
      folder: Where to look.
      pattern: The name of the file; may hold `*`.

    Returns:
      The one file that matches.

    Raises:
      DataError: If several match.
    """
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise DataError(
            f"data_dir={str(folder)!r} holds {', '.join(f.name for f in found)}; "
            f"accepted is one file {pattern}"
        )
    return found[0] if found else None


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, in units of [0, 1].

    Computed exactly from the histogram of the 256 levels, without a float copy
    of the images.

    Args:
      images: uint8 array `(n, height, width, channels)`.

    Returns:
      Two float32 arrays `(channels,)`; a constant channel has deviation 1.
    """
    levels = np.arange(256) / 255.0
    counts = np.stack(
        [
            np.bincount(images[..., channel].ravel(), minlength=256)
            for channel in range(images.shape[-1])
        ]
    )
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(axis=1)
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


def _check(name: str, train: Split, others: list[Split], num_classes: int) -> None:
    """Raises where the splits of a set do not fit together."""
    seen = np.unique(train.labels)
    for split in (train, *others):
        if not len(split):
            raise DataError(f"name={name!r}: a split has no examples")
        if split.images.shape[1:] != train.images.shape[1:]:
            raise DataError(
                f"name={name!r}: images of shape {split.images.shape[1:]} beside "
                f"{train.images.shape[1:]}; all splits must have one shape"
            )
        if split.labels.min() < 0 or split.labels.max() >= num_classes:
            raise DataError(
                f"name={name!r}: labels from {split.labels.min()} to "
                f"{split.labels.max()}; accepted are 0 to {num_classes - 1}"
            )
        if unseen := np.setdiff1d(split.labels, seen).size:
            raise DataError(
                f"name={name!r}: {unseen} classes have no training example (a "
                "few-shot set?); classification needs the same classes in each split"
            )
