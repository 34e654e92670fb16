"""Fifteen corruptions of images, in five severities each, of our own making.

They take any uint8 images `(n, height, width, channels)`, grey or coloured; sizes in
pixels are given for a side of 32 and go with the side. What is random is drawn anew for
each image, from a seed. The names are those of Hendrycks and Dietterich (2019) where
the kind is theirs; strengths and textures are not.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from experiments import checks

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 32

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def corrupt(
    images: np.ndarray, name: str, severity: int, *, seed: int = 0
) -> np.ndarray:
    """Images as a corruption leaves them.

    Args:
      images: uint8 array `(n, height, width, channels)`.
      name: One of `CORRUPTIONS`, or `"clean"`, which changes nothing.
      severity: From 1 to 5.
      seed: Of what is random.

    Returns:
      uint8 array of the same shape.

    Raises:
      ValueError: If the name is unknown, or there is no such severity.

    Example:
      >>> images = np.full((2, 8, 8, 1), 100, np.uint8)
      >>> [int(corrupt(images, "brightness", s)[0, 0, 0, 0]) for s in (1, 5)]
      [123, 215]
    """
    checks.one_of("name", name, ("clean", *CORRUPTIONS))
    checks.one_of("severity", severity, SEVERITIES)
    if name == "clean" or not len(images):
        return images
    rng = np.random.default_rng((seed, sorted(CORRUPTIONS).index(name), severity))
    found = CORRUPTIONS[name](images.astype(np.float32) / 255, severity - 1, rng)
    return np.round(255 * np.clip(found, 0, 1)).astype(np.uint8)


def _pixels(images: np.ndarray, size: float) -> float:
    """A size for a side of 32, for these images."""
    return size * max(images.shape[1:3]) / _SIDE


def gaussian_noise(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """Independent noise."""
    deviation = (0.04, 0.07, 0.10, 0.14, 0.18)[s]
    return x + deviation * rng.standard_normal(x.shape, np.float32)


def shot_noise(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """As of so many photons a pixel."""
    photons = (250, 100, 50, 30, 15)[s]
    return rng.poisson(photons * x).astype(np.float32) / photons


def impulse_noise(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """Values that are black or white."""
    share = (0.01, 0.03, 0.06, 0.10, 0.15)[s]
    drawn = rng.random(x.shape, np.float32)
    return np.where(drawn < share, np.where(drawn < share / 2, 0, 1), x)


def _filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Images under a kernel `(h, w)` of sum one."""
    kernel = (kernel / kernel.sum()).astype(np.float32)
    return ndimage.convolve(x, kernel[None, :, :, None], mode="nearest")


def defocus_blur(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """A disk."""
    radius = _pixels(x, (0.8, 1.2, 1.6, 2.1, 2.7)[s])
    reach = int(np.ceil(radius))
    away = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    return _filtered(x, np.clip(radius + 0.5 - away, 0, 1))


def motion_blur(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """A line, in one of eight directions for each image."""
    length = _pixels(x, (2, 3, 4.5, 6, 8)[s])
    reach = int(np.ceil(length / 2))
    chosen = rng.integers(8, size=len(x))
    result = np.empty_like(x)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    for direction in range(8):
        angle = np.pi * direction / 8
        along = rows * np.sin(angle) + columns * np.cos(angle)
        across = rows * np.cos(angle) - columns * np.sin(angle)
        kernel = np.clip(length / 2 + 0.5 - abs(along), 0, 1)
        kernel = kernel * np.clip(1 - abs(across), 0, 1)
        own = chosen == direction
        result[own] = _filtered(x[own], kernel)
    return result


def _along(x: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """Images with a matrix `(new, old)` applied along an axis."""
    return np.moveaxis(np.tensordot(x, matrix, (axis, 1)), -1, axis)


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of each image, larger."""
    for axis in (1, 2):
        size = x.shape[axis]
        middle = (size - 1) / 2
        at = middle + (np.arange(size) - middle) / factor
        weights = np.clip(1 - abs(at[:, None] - np.arange(size)), 0, 1)
        x = _along(x, weights.astype(np.float32), axis)
    return x


def zoom_blur(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """A mean over zooms."""
    most = (0.08, 0.14, 0.2, 0.28, 0.4)[s]
    return np.mean([_zoomed(x, 1 + z) for z in np.linspace(0, most, 6)], axis=0)


def _texture(
    shape: tuple[int, ...], rng: np.random.Generator, roughness: float
) -> np.ndarray:
    """Random fields in [0, 1] of shape `(n, height, width, 1)`, coarse or fine."""
    sides = shape[1:3]
    waves = np.hypot(np.fft.fftfreq(sides[0])[:, None], np.fft.rfftfreq(sides[1]))
    waves[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((shape[0], *sides), np.float32))
    field = np.fft.irfft2(noise * waves**-roughness, s=sides)
    low, high = (f(field, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return ((field - low) / (high - low))[..., None].astype(np.float32)


def snow(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """White flakes that fall aslant, before an image that pales."""
    share, pale = ((0.02, 0.1), (0.04, 0.15), (0.06, 0.2), (0.09, 0.3), (0.13, 0.4))[s]
    flakes = (rng.random((*x.shape[:3], 1), np.float32) < share).astype(np.float32)
    streak = np.eye(1 + 2 * max(1, round(_pixels(x, 1))))
    flakes = np.clip(2 * _filtered(flakes, streak), 0, 1)
    return np.maximum((1 - pale) * x + pale, flakes)


def frost(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """Ridges of ice over a darkened image."""
    image, ice = ((0.9, 0.3), (0.8, 0.4), (0.7, 0.5), (0.65, 0.6), (0.6, 0.7))[s]
    field = _texture(x.shape, rng, 1.2)
    return image * x + ice * (1 - abs(2 * field - 1)) ** 2


def fog(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth veil."""
    veil = (0.3, 0.6, 1.0, 1.5, 2.2)[s]
    return (x + veil * (0.5 + 0.5 * _texture(x.shape, rng, 2.0))) / (1 + veil)


def brightness(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """All of it lighter."""
    return x + (0.09, 0.18, 0.27, 0.36, 0.45)[s]


def contrast(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """Nearer to the mean of each image."""
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean + (0.7, 0.5, 0.35, 0.25, 0.15)[s] * (x - mean)


def pixelate(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """Fewer and larger pixels."""
    share = (0.8, 0.65, 0.5, 0.4, 0.3)[s]
    for axis in (1, 2):
        size = x.shape[axis]
        count = max(1, round(share * size))
        block = np.arange(size) * count // size
        onto = (block[:, None] == np.arange(count)).astype(np.float32)
        x = _along(x, onto @ (onto / onto.sum(axis=0)).T, axis)
    return x


def jpeg(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """What the compression leaves."""
    quality = (50, 30, 18, 10, 5)[s]
    pixels = np.round(255 * x).astype(np.uint8)
    result = np.empty_like(x)
    for place, image in enumerate(pixels):
        buffer = io.BytesIO()
        grey = image.shape[-1] == 1
        Image.fromarray(image[..., 0] if grey else image).save(
            buffer, "JPEG", quality=quality
        )
        with Image.open(buffer) as decoded:
            result[place] = np.asarray(decoded).reshape(image.shape) / np.float32(255)
    return result


def rotation(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """About the middle, either way."""
    angle = (10, 17, 24, 32, 40)[s]
    left = rng.random(len(x)) < 0.5
    result = np.empty_like(x)
    for own, turn in ((left, angle), (~left, -angle)):
        result[own] = ndimage.rotate(
            x[own], turn, axes=(1, 2), reshape=False, order=1, mode="nearest"
        )
    return result


def occlusion(x: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """A grey square somewhere in each image."""
    share = (0.2, 0.28, 0.36, 0.44, 0.52)[s]
    inside = np.ones((*x.shape[:3], 1), bool)
    for axis in (1, 2):
        size = x.shape[axis]
        side = max(1, round(share * size))
        begin = rng.integers(size - side + 1, size=len(x))[:, None]
        place = np.arange(size)
        line = (place >= begin) & (place < begin + side)
        inside &= line[:, :, None, None] if axis == 1 else line[:, None, :, None]
    return np.where(inside, np.float32(0.5), x)


CORRUPTIONS: dict[str, Corruption] = {
    one.__name__: one
    for one in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        pixelate,
        jpeg,
        rotation,
        occlusion,
    )
}
