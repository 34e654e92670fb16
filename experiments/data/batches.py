"""Batches of a split, and what happens to their pixels on the device."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.dataset import Dataset, Split


def epoch_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The shuffled batches of one epoch; the last partial batch is dropped.

    The order depends on `(seed, epoch)` alone, so a run that starts again at an
    epoch sees what it would have seen.

    Args:
      split: The examples.
      batch_size: The size of every batch, at most `len(split)`.
      seed: Seed of the run.
      epoch: Number of the epoch, from 0.

    Returns:
      An iterator over `len(split) // batch_size` pairs of uint8 images
      `(batch_size, height, width, channels)` and int32 labels `(batch_size,)`.

    Raises:
      ValueError: If no batch of that size can be made.

    Example:
      >>> split = Split(np.zeros((10, 2, 2, 1), np.uint8), np.arange(10))
      >>> [labels.size for _, labels in epoch_batches(split, 4, seed=0, epoch=0)]
      [4, 4]
    """
    if not 1 <= batch_size <= len(split):
        raise ValueError(
            f"batch_size={batch_size}; accepted are 1 to {len(split)}, the number "
            "of examples"
        )
    order = np.random.default_rng((seed, epoch)).permutation(len(split))
    starts = range(0, len(split) - batch_size + 1, batch_size)
    chosen = (order[start : start + batch_size] for start in starts)
    return ((split.images[index], split.labels[index]) for index in chosen)


def normalize(images: jax.Array | np.ndarray, dataset: Dataset) -> jax.Array:
    """Scales to [0, 1], then to the training set's zero mean and unit deviation.

    Args:
      images: uint8 array `(..., height, width, channels)`.
      dataset: Whose statistics to use; a constant under `jit`, so close over it.

    Returns:
      float32 array of the same shape.
    """
    shift, scale = (jnp.asarray(255 * x) for x in (dataset.mean, dataset.std))
    shape = (1,) * (images.ndim - 1) + shift.shape
    images = jnp.asarray(images).astype(jnp.float32)
    return (images - shift.reshape(shape)) / scale.reshape(shape)


def augment(images: jax.Array, key: jax.Array, *, padding: int = 4) -> jax.Array:
    """Random shifts by up to `padding` pixels and horizontal flips.

    The usual augmentation of CIFAR-size images: a crop of the original size out
    of the image with `padding` black pixels on each side, flipped half the time,
    drawn anew for each image.

    Args:
      images: array `(n, height, width, channels)`, before `normalize` (black is 0).
      key: Random key of this batch.
      padding: The largest shift, in pixels.

    Returns:
      Array of the same shape and dtype.
    """
    num = images.shape[0]
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (num, 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_key, shape=(num,))
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, around)

    def one(image, shift, flip):
        start = (shift[0], shift[1], 0)
        crop = jax.lax.dynamic_slice(image, start, images.shape[1:])
        return jnp.where(flip, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, shifts, flips)
