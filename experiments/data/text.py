"""The source of Python's standard library as text: it is on every machine."""

import hashlib
import pathlib
import sysconfig
import zlib
from typing import NamedTuple

import numpy as np

# Left out: what is installed besides, and the tests, which not every system has.
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")


class Text(NamedTuple):
    """Bytes, split by file.

    Attributes:
      train: Shape `(n,)`, uint8.
      validation: Likewise.
      test: Likewise.
      digest: Of all of them: results are compared at one digest only.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    digest: str


def standard_library() -> Text:
    """The modules of the standard library, one in twenty for validation and for test.

    Returns:
      The text.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in _LEFT_OUT for part in name.parts):
            continue
        fold = zlib.crc32(name.as_posix().encode()) % 20
        split = {0: "validation", 1: "test"}.get(fold, "train")
        parts[split].append(path.read_bytes())
    joined = [b"".join(parts[split]) for split in ("train", "validation", "test")]
    digest = hashlib.sha256(b"".join(joined)).hexdigest()
    arrays = [np.frombuffer(text, np.uint8) for text in joined]
    return Text(*arrays, digest)


def windows(text: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """Windows at random places.

    Args:
      text: Bytes, shape `(n,)`.
      count: How many windows.
      length: Bytes of each.
      seed: Of the places.

    Returns:
      Shape `(count, length)`, uint8.
    """
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length)]
