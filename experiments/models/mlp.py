"""A multilayer perceptron on flattened images."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.options import Dtype, Widths


class MLP(nnx.Module):
    """Dense layers with ReLU.

    Args:
      image_shape: The shape `(height, width, channels)` of one image.
      num_classes: The number of logits.
      hidden: The widths of the hidden layers.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        hidden: Widths = (256, 256),
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = (math.prod(image_shape), *hidden)
        self.layers = nnx.List(
            nnx.Linear(
                d_in,
                d_out,
                dtype=dtype,
                kernel_init=nnx.initializers.he_normal(),
                rngs=rngs,
            )
            for d_in, d_out in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(widths[-1], num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `(n, num_classes)` of images `(n, height, width, channels)`."""
        x = images.reshape(len(images), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x).astype(jnp.float32)
