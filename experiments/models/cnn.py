"""A small convolutional network, for images of about 8 to 64 pixels."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.options import Dtype, Width, Widths


class CNN(nnx.Module):
    """Blocks of convolution, ReLU and pooling, then two dense layers.

    Every block halves the image, rounding up, so that images of any size fit.

    Args:
      image_shape: The shape `(height, width, channels)` of one image.
      num_classes: The number of logits.
      channels: The output channels of each block.
      hidden: The width of the dense layer before the logits.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        channels: Widths = (32, 64, 128),
        hidden: Width = 256,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width, d_in = image_shape
        he_normal = nnx.initializers.he_normal()
        convs = []
        for d_out in channels:
            convs.append(
                nnx.Conv(
                    d_in,
                    d_out,
                    kernel_size=(3, 3),
                    dtype=dtype,
                    kernel_init=he_normal,
                    rngs=rngs,
                )
            )
            height, width, d_in = -(-height // 2), -(-width // 2), d_out
        self.convs = nnx.List(convs)
        self.dense = nnx.Linear(
            height * width * d_in, hidden, dtype=dtype, kernel_init=he_normal, rngs=rngs
        )
        self.head = nnx.Linear(hidden, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `(n, num_classes)` of images `(n, height, width, channels)`."""
        x = images
        for conv in self.convs:
            x = nnx.relu(conv(x))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(x).astype(jnp.float32)
