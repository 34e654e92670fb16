"""What a problem of the suite is: a few functions and the data that it is judged by."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Batch = tuple[Any, ...]


class Problem(NamedTuple):
    """A loss to be made small in a number of steps.

    Its data are the same in all runs. The seed of a run chooses where it begins and
    what its steps see.

    Attributes:
      init: From a random key to the parameters, a dict of arrays.
      loss: `loss(params, *batch)`, a scalar: what steps descend.
      batch: `batch(seed, number)`, what step `number` of a run sees.
      measure: `measure(params, *part)`, a scalar: what counts.
      parts: What `measure` sees, by the names `validation` and `test`. They are the
        same where the loss is an expectation, known without a sample.
      steps: Steps of a run.
      chance: What a run that diverged counts with: the loss of an answer that does not
        look at its input.
      unit: Of `measure`.
      network: Whether the parameters are a network's, of which some optimizers leave
        the embedding and the head to another; else all matrices are alike.
      digest: Of data that other machines may have otherwise.
    """

    init: Callable[[jax.Array], dict[str, jax.Array]]
    loss: Callable[..., jax.Array]
    batch: Callable[[int, int], Batch]
    measure: Callable[..., jax.Array]
    parts: Mapping[str, Batch]
    steps: int
    chance: float = 1.0
    unit: str = "of the zero function's"
    network: bool = True
    digest: str = ""


def normal(
    key: jax.Array, scale: float = 1.0, /, **shapes: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Normal kernels whose outputs are as large as their inputs.

    Args:
      key: A random key.
      scale: A factor of all.
      **shapes: Shapes `(..., d_in, d_out)` by name.

    Returns:
      The kernels, entries of standard deviation `scale / sqrt(d_in)`.

    Example:
      >>> normal(jax.random.key(0), first=(8, 4), second=(4, 2))["second"].shape
      (4, 2)
    """
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(one, shape) * (scale / shape[-2] ** 0.5)
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def falling(size: int, least: float, rng: np.random.Generator) -> np.ndarray:
    """A matrix whose singular values fall from 1, evenly in their logarithm.

    Args:
      size: Of both sides.
      least: The smallest singular value.
      rng: Of its singular vectors.

    Returns:
      Shape `(size, size)`, float32.

    Example:
      >>> matrix = falling(3, 0.01, np.random.default_rng(0))
      >>> np.linalg.svd(matrix, compute_uv=False).round(2)
      array([1.  , 0.1 , 0.01], dtype=float32)
    """
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    return (left * np.geomspace(1.0, least, size) @ right).astype(np.float32)


def squares(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """The mean square of the difference of two arrays."""
    return jnp.mean((found - wanted) ** 2)
