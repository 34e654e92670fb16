"""Pixels out of encoded images, alike for every source."""

import io

import numpy as np
from PIL import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decodes one PNG or JPEG image.

    Args:
      data: The encoded image.
      shape: The shape `(height, width, channels)` that it must have; grey images
        become coloured ones where three channels are asked for.

    Returns:
      uint8 array of shape `shape`.

    Raises:
      ValueError: If the image is damaged or of another size.

    Example:
      >>> buffer = io.BytesIO()
      >>> Image.new("L", (3, 2), color=7).save(buffer, "PNG")
      >>> decode(buffer.getvalue(), (2, 3, 1)).ravel()
      array([7, 7, 7, 7, 7, 7], dtype=uint8)
    """
    mode = _MODES[shape[-1]]
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"damaged image ({first_line(error)})") from error
    if pixels.shape[:2] != tuple(shape[:2]):
        raise ValueError(f"image of {pixels.shape[:2]} pixels instead of {shape[:2]}")
    return pixels.reshape(shape)


def encode(pixels: np.ndarray) -> bytes:
    """Encodes a uint8 image `(height, width, channels)` as PNG."""
    buffer = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(squeezed).save(buffer, "PNG")
    return buffer.getvalue()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
