"""Small sets, as arrays and in the publishers' formats."""

import io
import zipfile

import numpy as np
from PIL import Image

from experiments.data import Split


def make_split(num: int, num_classes: int, shape=(28, 28, 1), seed=0) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    return Split(images, np.arange(num, dtype=np.int32) % num_classes)


def medmnist_arrays(channels: int = 1) -> dict[str, np.ndarray]:
    arrays = {}
    for seed, (key, num) in enumerate({"train": 12, "val": 6, "test": 4}.items()):
        split = make_split(num, 2, (28, 28, channels), seed)
        arrays[f"{key}_images"] = (
            split.images.squeeze(-1) if channels == 1 else (split.images)
        )
        arrays[f"{key}_labels"] = split.labels[:, None].astype(np.uint8)
    return arrays


def jpeg(seed: int, mode: str = "RGB", size: int = 64) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def tiny_imagenet_files() -> dict[str, bytes]:
    """The publishers' layout, with images of three classes only."""
    wnids = [f"n{number:08d}" for number in range(200)]
    files = {"wnids.txt": "\n".join(reversed(wnids)).encode()}
    annotations = []
    for label in (0, 7, 199):
        wnid = wnids[label]
        for i in range(10):
            mode = "L" if i == 3 else "RGB"
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(label + i, mode)
        files[f"val/images/val_{label}.JPEG"] = jpeg(300 + label)
        annotations.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    return files


def write_zip(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path
