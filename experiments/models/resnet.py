"""ResNet-18 with the stem for 32 x 32 images (He et al., 2016)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.options import Dtype, Width


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut, projected where shapes change.

    Args:
      d_in: Input channels.
      d_out: Output channels.
      strides: Strides of the first convolution.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.
    """

    def __init__(
        self, d_in: int, d_out: int, *, strides: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        conv, norm = _layers(dtype, rngs)
        self.conv1 = conv(d_in, d_out, (3, 3), strides)
        self.norm1 = norm(d_out)
        self.conv2 = conv(d_out, d_out, (3, 3))
        self.norm2 = norm(d_out)
        self.projects = strides != 1 or d_in != d_out
        if self.projects:
            self.shortcut = conv(d_in, d_out, (1, 1), strides)
            self.shortcut_norm = norm(d_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(n, height, width, d_in)` to `(n, height', width', d_out)`."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNet18(nnx.Module):
    """Four stages of two blocks, then a mean over positions.

    Batch normalisation learns running statistics in training mode and uses them
    in evaluation mode; `model.train()` and `model.eval()` switch.

    Args:
      image_shape: The shape `(height, width, channels)` of one image.
      num_classes: The number of logits.
      width: The channels of the first stage; each later one doubles them.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: Width = 64,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv, norm = _layers(dtype, rngs)
        self.stem = conv(image_shape[-1], width, (3, 3))
        self.stem_norm = norm(width)
        blocks, d_in = [], width
        for stage in range(4):
            d_out = width * 2**stage
            for strides in (1 if stage == 0 else 2, 1):
                blocks.append(
                    BasicBlock(d_in, d_out, strides=strides, dtype=dtype, rngs=rngs)
                )
                d_in = d_out
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(d_in, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `(n, num_classes)` of images `(n, height, width, channels)`."""
        x = nnx.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


def _layers(dtype: DTypeLike, rngs: nnx.Rngs):
    """The convolution and the normalisation that all blocks share."""
    conv = partial(
        nnx.Conv,
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )
    # Epochs of small sets are few steps, so the average is over about ten of them.
    norm = partial(nnx.BatchNorm, momentum=0.9, dtype=dtype, rngs=rngs)
    return conv, norm
