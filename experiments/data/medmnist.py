"""MedMNIST's 2-D single-label sets, read from the publishers' `.npz` files.

Names, classes and checksums are those of MedMNIST v2 (Yang et al., 2023,
Scientific Data 10:41; doi:10.1038/s41597-022-01721-8), images of 28 x 28 pixels.
"""

import dataclasses
import pathlib
import zipfile
import zlib

import numpy as np

from experiments.data.dataset import DataError, Dataset, Split, make_dataset
from experiments.data.images import first_line

SIZE = 28
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclasses.dataclass(frozen=True)
class MedMNIST:
    """One of the sets.

    Attributes:
      name: The name, also of its file.
      channels: 1 or 3.
      classes: The names of the classes, in order of their labels.
      md5: Checksum of the publishers' file.
    """

    name: str
    channels: int
    classes: tuple[str, ...]
    md5: str

    @property
    def filename(self) -> str:
        """The name of the publishers' file."""
        return f"{self.name}.npz"

    @property
    def url(self) -> str:
        """Where the publishers offer it."""
        return f"https://zenodo.org/records/10519652/files/{self.filename}?download=1"


_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)

SETS = {
    spec.name: spec
    for spec in (
        MedMNIST(
            "pathmnist",
            3,
            (
                "adipose",
                "background",
                "debris",
                "lymphocytes",
                "mucus",
                "smooth muscle",
                "normal colon mucosa",
                "cancer-associated stroma",
                "colorectal adenocarcinoma epithelium",
            ),
            "a8b06965200029087d5bd730944a56c1",
        ),
        MedMNIST(
            "dermamnist",
            3,
            (
                "actinic keratoses and intraepithelial carcinoma",
                "basal cell carcinoma",
                "benign keratosis-like lesions",
                "dermatofibroma",
                "melanoma",
                "melanocytic nevi",
                "vascular lesions",
            ),
            "0744692d530f8e62ec473284d019b0c7",
        ),
        MedMNIST(
            "octmnist",
            1,
            (
                "choroidal neovascularization",
                "diabetic macular edema",
                "drusen",
                "normal",
            ),
            "c68d92d5b585d8d81f7112f81e2d0842",
        ),
        MedMNIST(
            "pneumoniamnist",
            1,
            ("normal", "pneumonia"),
            "28209eda62fecd6e6a2d98b1501bb15f",
        ),
        MedMNIST(
            "retinamnist",
            3,
            ("0", "1", "2", "3", "4"),
            "bd4c0672f1bba3e3a89f0e4e876791e4",
        ),
        MedMNIST(
            "breastmnist",
            1,
            ("malignant", "normal, benign"),
            "750601b1f35ba3300ea97c75c52ff8f6",
        ),
        MedMNIST(
            "bloodmnist",
            3,
            (
                "basophil",
                "eosinophil",
                "erythroblast",
                "immature granulocytes",
                "lymphocyte",
                "monocyte",
                "neutrophil",
                "platelet",
            ),
            "7053d0359d879ad8a5505303e11de1dc",
        ),
        MedMNIST(
            "tissuemnist",
            1,
            (
                "collecting duct, connecting tubule",
                "distal convoluted tubule",
                "glomerular endothelial cells",
                "interstitial endothelial cells",
                "leukocytes",
                "podocytes",
                "proximal tubule segments",
                "thick ascending limb",
            ),
            "ebe78ee8b05294063de985d821c1c34b",
        ),
        MedMNIST("organamnist", 1, _ORGANS, "68e3f8846a6bd62f0c9bf841c0d9eacc"),
        MedMNIST("organcmnist", 1, _ORGANS, "b9ceb9546e10131b32923c5bbeaea2b1"),
        MedMNIST("organsmnist", 1, _ORGANS, "9ab87b696fb54e2a387ebe992d6ed5f1"),
    )
}

REFUSED = {
    "chestmnist": "each image has up to 14 labels, and classification here has one",
}


def load(path: pathlib.Path, *, name: str) -> Dataset:
    """Loads a set from the publishers' file.

    Args:
      path: The `.npz` file.
      name: One of `SETS`.

    Returns:
      The data set, in its official splits.

    Raises:
      DataError: As `read` does.
    """
    splits = read(path, name=name)
    return make_dataset(name, **splits, num_classes=len(SETS[name].classes), seed=0)


def read(path: pathlib.Path, *, name: str) -> dict[str, Split]:
    """Reads the official splits of a set.

    Args:
      path: The `.npz` file.
      name: One of `SETS`.

    Returns:
      The splits `train`, `validation` and `test`.

    Raises:
      DataError: If the file is damaged, lacks an array, or has arrays of other
        shapes or dtypes than the set's.
    """
    try:
        # Opened as a zip file first: `np.load` also takes bare arrays and pickles.
        with zipfile.ZipFile(path), np.load(path) as arrays:
            return {
                split: _split(arrays, key, f"name={name!r}: {path}", SETS[name])
                for split, key in _SPLITS.items()
            }
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"name={name!r}: {path} is not a whole .npz file ({first_line(error)})"
        ) from error


def _split(arrays, key: str, where: str, spec: MedMNIST) -> Split:
    """One split, after a look at its arrays."""
    missing = [k for k in (f"{key}_images", f"{key}_labels") if k not in arrays]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; it has {list(arrays)}")
    images, labels = arrays[f"{key}_images"], arrays[f"{key}_labels"]
    shape = (SIZE, SIZE) if spec.channels == 1 else (SIZE, SIZE, spec.channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise DataError(
            f"{where} has {key}_images {images.dtype} {images.shape}; accepted is "
            f"uint8 (n, {', '.join(map(str, shape))})"
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images), 1):
        raise DataError(
            f"{where} has {key}_labels {labels.dtype} {labels.shape}; accepted is "
            f"integer ({len(images)}, 1)"
        )
    images = images.reshape(-1, SIZE, SIZE, spec.channels)
    return Split(images, labels[:, 0].astype(np.int32))
