"""Small few-shot sets, prepared by TFDS as the real ones are."""

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import images
from experiments.data.fewshot import CIFAR_FS_SPLITS

ALPHABETS, CHARACTERS, DRAWINGS = 7, 2, 4


class Drawings(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features and splits of Omniglot: one black pixel says which character."""

    name = "omniglot"
    VERSION = tfds.core.Version("3.0.0")

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(105, 105, 3)),
                    "alphabet": tfds.features.ClassLabel(num_classes=2 * ALPHABETS),
                    "label": tfds.features.ClassLabel(num_classes=99),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0),
            "test": self._generate_examples(ALPHABETS),
        }

    def _generate_examples(self, first):
        for alphabet in range(first, first + ALPHABETS):
            for character in range(CHARACTERS):
                label = alphabet * CHARACTERS + character
                for drawing in range(DRAWINGS):
                    pixels = np.full((105, 105, 3), 255, np.uint8)
                    # A square of ink, at a place of the label's own.
                    row, column = 8 * (label // 7) + 4, 12 * (label % 7) + 4
                    pixels[row : row + 8, column : column + 8] = 0
                    yield (
                        f"{label}/{drawing}",
                        {
                            "image": images.encode(pixels),
                            "alphabet": alphabet,
                            "label": label,
                        },
                    )


class Colours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-100 in the small: the colour of an image is its class."""

    name = "cifar100"
    VERSION = tfds.core.Version("3.0.2")
    USED = ("apple", "baby", "beaver", "bee", "worm", "otter")
    HELD = sorted(set().union(*CIFAR_FS_SPLITS.values()) - set(USED))
    LABELS = (*USED, *HELD, *(f"other {number}" for number in range(62)))

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(names=self.LABELS),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

    def _generate_examples(self, number):
        for label in range(len(self.USED)):
            for index in range(number):
                pixels = np.full((32, 32, 3), label, np.uint8)
                key = f"{label}/{index}"
                yield key, {"image": images.encode(pixels), "label": label}
