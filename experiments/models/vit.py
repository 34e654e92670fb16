"""A small Vision Transformer (Dosovitskiy et al., 2021), mean-pooled.

As in Beyer et al., 2022 (arXiv:2205.01580), the mean over patches replaces the
class token; position embeddings are learned.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.options import Dtype, OptionalWidth, Width

MAX_PATCHES = 64


class EncoderBlock(nnx.Module):
    """Self-attention and a two-layer perceptron, each after normalisation.

    Args:
      dim: Width of the residual stream.
      heads: Attention heads; they divide `dim`.
      mlp_dim: Width of the perceptron.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.
    """

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.attention_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads,
            dim,
            dtype=dtype,
            kernel_init=nnx.initializers.xavier_uniform(),
            decode=False,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, mlp_dim, dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(mlp_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `(n, tokens, dim)` to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class ViT(nnx.Module):
    """Patches, encoder blocks, a mean over patches and a linear head.

    Args:
      image_shape: The shape `(height, width, channels)` of one image.
      num_classes: The number of logits.
      patch: Side of a patch; it divides height and width. By default the smallest
        one, from 2, that makes at most 64 patches: 2 for images of 8 x 8, 4 for
        28 x 28 and 32 x 32, 8 for 64 x 64.
      dim: Width of the residual stream.
      depth: Number of blocks.
      heads: Attention heads; they divide `dim`.
      mlp_dim: Width of the perceptrons; by default four times `dim`.
      dtype: The dtype of the computation; parameters are float32.
      rngs: Random streams.

    Raises:
      ValueError: If `patch` does not divide the image or `heads` not `dim`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch: OptionalWidth = None,
        dim: Width = 128,
        depth: Width = 6,
        heads: Width = 4,
        mlp_dim: OptionalWidth = None,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        accepted = _patches(height, width)
        if patch is None:
            few = (
                p for p in accepted if p > 1 and _count(image_shape, p) <= MAX_PATCHES
            )
            patch = next(few, accepted[-1])
        if patch not in accepted:
            raise ValueError(
                f"patch={patch} does not divide images of {height} x {width}; accepted "
                f"are {', '.join(map(str, accepted))}"
            )
        self.check(dim=dim, heads=heads)
        self.embed = nnx.Conv(
            channels,
            dim,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            dtype=dtype,
            rngs=rngs,
        )
        tokens = _count(image_shape, patch)
        self.positions = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, tokens, dim), jnp.float32)
        )
        self.blocks = nnx.List(
            EncoderBlock(dim, heads, mlp_dim or 4 * dim, dtype=dtype, rngs=rngs)
            for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, dtype=dtype, rngs=rngs)

    @staticmethod
    def check(*, dim: int, heads: int, **others: Any) -> None:
        """Checks what options say of one another, before there is a model."""
        del others
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}")

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `(n, num_classes)` of images `(n, height, width, channels)`."""
        x = self.embed(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1)).astype(jnp.float32)


def _patches(height: int, width: int) -> list[int]:
    """The sides that divide both height and width, ascending."""
    side = math.gcd(height, width)
    return [p for p in range(1, side + 1) if side % p == 0]


def _count(image_shape: tuple[int, int, int], patch: int) -> int:
    """How many patches an image has."""
    return (image_shape[0] // patch) * (image_shape[1] // patch)
