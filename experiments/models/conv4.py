"""The four-block convolutional network of few-shot learning."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.options import Dtype, Flag, Width


class Conv4(nnx.Module):
    """Four blocks of convolution, batch normalisation and ReLU, then a linear head.

    Following Vinyals et al. (2016) and Finn et al. (2017), who halve the image by
    strided convolutions and average its last positions (Omniglot), or by max pooling
    and flatten them (natural images).

    Args:
      image_shape: The shape `(height, width, channels)` of one image.
      num_classes: The number of logits.
      channels: The output channels of every block.
      pool: Whether blocks halve the image by pooling, and not by a stride.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        channels: Width = 64,
        pool: Flag = False,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width, d_in = image_shape
        self.pool = pool
        convs, norms = [], []
        for _ in range(4):
            convs.append(
                nnx.Conv(
                    d_in,
                    channels,
                    kernel_size=(3, 3),
                    strides=1 if pool else 2,
                    dtype=dtype,
                    kernel_init=nnx.initializers.he_normal(),
                    rngs=rngs,
                )
            )
            norms.append(nnx.BatchNorm(channels, dtype=dtype, rngs=rngs))
            height, width, d_in = height // 2, width // 2, channels
        if pool and not height * width:
            raise ValueError(
                f"image_shape={image_shape!r}; accepted with pool=True are images of "
                "16 × 16 pixels or more"
            )
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        features = height * width * channels if pool else channels
        self.head = nnx.Linear(features, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `(n, num_classes)` of images `(n, height, width, channels)`."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
            x = _halve(x) if self.pool else x
        x = x.reshape(len(x), -1) if self.pool else x.mean((1, 2))
        return self.head(x).astype(jnp.float32)


def _halve(x: jax.Array) -> jax.Array:
    """The maximum of each 2 × 2 square; an odd row or column is left out."""
    n, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(n, height, 2, width, 2, channels).max((2, 4))
