"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8, in its wheel."""

import numpy as np

from experiments.data.dataset import Dataset, Split, make_dataset

NAME = "digits"


def load(*, seed: int) -> Dataset:
    """The digits, split 70 / 10 / 20 by class; the test part never changes.

    Args:
      seed: Chooses which of the other examples validate.

    Returns:
      The data set; the 17 levels of the images are spread over 0 to 255.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        rest, test_size=0.125, stratify=labels[rest], random_state=seed
    )
    return make_dataset(
        NAME,
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(images[test], labels[test]),
        num_classes=10,
        seed=seed,
    )
