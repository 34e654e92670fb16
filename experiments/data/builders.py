"""Builders for TensorFlow Datasets of the sets that it does not have.

They read the publishers' files with the readers of this package and hand over
encoded images, so that preparation in the array_record format needs no
TensorFlow. Importing this module registers them: `tfds.load("medmnist/pathmnist")`
and `tfds.load("tiny_imagenet")` work as for any other set.
"""

import hashlib
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds

from experiments.data import images, medmnist, tiny_imagenet
from experiments.data.dataset import DataError, find_raw


class Medmnist(tfds.core.GeneratorBasedBuilder):
    """MedMNIST v2, one configuration for each 2-D single-label set."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name, description=", ".join(spec.classes))
        for name, spec in medmnist.SETS.items()
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Optional: the set's .npz file, else downloaded."

    def _info(self) -> tfds.core.DatasetInfo:
        spec = medmnist.SETS[self.builder_config.name]
        return _info(
            self,
            description="Biomedical images of 28 x 28 pixels.",
            homepage="https://medmnist.com",
            shape=(medmnist.SIZE, medmnist.SIZE, spec.channels),
            label=tfds.features.ClassLabel(names=spec.classes),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        spec = medmnist.SETS[self.builder_config.name]
        path = _manual(dl_manager, spec.filename)
        path = path or _download(dl_manager, spec.url, md5=spec.md5)
        splits = medmnist.read(path, name=spec.name)
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(self, split) -> Iterator[tuple[int, dict]]:
        for index, (pixels, label) in enumerate(
            zip(split.images, split.labels, strict=True)
        ):
            yield index, {"image": images.encode(pixels), "label": int(label)}


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Tiny ImageNet: 200 classes of 64 x 64 images."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Optional: the publishers' zip file, else downloaded."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(
            self,
            description="200 classes of ImageNet, reduced to 64 x 64 pixels.",
            homepage="http://cs231n.stanford.edu",
            shape=tiny_imagenet.SHAPE,
            label=tfds.features.ClassLabel(num_classes=tiny_imagenet.NUM_CLASSES),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        path = _manual(dl_manager, tiny_imagenet.PATTERN)
        path = path or _download(dl_manager, tiny_imagenet.URL, md5=tiny_imagenet.MD5)
        return {
            split: self._generate_examples(path, split)
            for split in ("train", "validation")
        }

    def _generate_examples(self, path, split: str) -> Iterator[tuple[str, dict]]:
        for example in tiny_imagenet.read(path, split):
            yield example.filename, {"image": example.data, "label": example.label}


def prepare(
    name: str, *, data_dir: pathlib.Path, manual_dir: pathlib.Path | None = None
) -> None:
    """Downloads a set and prepares it in the array_record format.

    Args:
      name: A set of MedMNIST, `tiny_imagenet`, or any name that TFDS knows.
      data_dir: The folder for the prepared set.
      manual_dir: A folder with the publishers' file, to be used instead of a
        download. Its checksum is not compared, so that it may be a part.

    Raises:
      DataError: If TFDS does not know the set, a download fails or does not have
        the publishers' checksum, or the set's own builder needs TensorFlow.
    """
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        builder = tfds.builder(
            f"medmnist/{name}" if name in medmnist.SETS else name,
            data_dir=data_dir,
            file_format="array_record",
        )
        builder.download_and_prepare(download_config=config)
    except DataError:
        raise
    except Exception as error:  # Of the network, the disk, TFDS or a builder of it.
        if "No module named 'tensorflow'" in str(error):
            raise DataError(
                f"name={name!r}: its builder in TFDS needs TensorFlow, once, to "
                "prepare the set: pip install 'dsbp-jax[prepare]'"
            ) from error
        raise DataError(
            f"name={name!r} cannot be prepared in data_dir={str(data_dir)!r}: "
            f"{images.first_line(error)}"
        ) from error


def _info(
    builder, *, description: str, homepage: str, shape: tuple[int, ...], label
) -> tfds.core.DatasetInfo:
    """What both sets say of themselves; the publishers' order is kept."""
    image = tfds.features.Image(shape=shape)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        homepage=homepage,
        features=tfds.features.FeaturesDict({"image": image, "label": label}),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )


def _manual(dl_manager, pattern: str) -> pathlib.Path | None:
    """The publishers' file in the manual folder, if there is such a folder."""
    try:
        folder = pathlib.Path(dl_manager.manual_dir)
    except AssertionError:  # It does not exist or is empty.
        return None
    return find_raw(folder, pattern)


def _download(dl_manager, url: str, *, md5: str) -> pathlib.Path:
    """Downloads a file and compares its checksum with the publishers'."""
    path = pathlib.Path(dl_manager.download(url))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        path.unlink()  # Or TFDS would take it for the file next time.
        raise DataError(f"{url} has the MD5 checksum {found} instead of {md5}")
    return path
