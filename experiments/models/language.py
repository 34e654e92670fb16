"""A causal byte-level Transformer."""

import jax
import jax.numpy as jnp
from flax import nnx

BYTES = 256


class CausalBlock(nnx.Module):
    """Causal self-attention and a two-layer perceptron, each after normalisation.

    Args:
      width: Width of the residual stream.
      heads: Attention heads; they divide `width`.
      rngs: Random streams.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `(n, tokens, width)` to tokens of the same shape."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class ByteTransformer(nnx.Module):
    """Embedded bytes and positions, causal blocks, and a linear head.

    Args:
      width: Width of the residual stream.
      depth: Blocks.
      heads: Attention heads of each; they divide `width`.
      context: Bytes that it sees at the most.
      rngs: Random streams.
    """

    def __init__(
        self, width: int, depth: int, heads: int, context: int, *, rngs: nnx.Rngs
    ):
        small = nnx.initializers.normal(0.02)
        self.bytes = nnx.Embed(BYTES, width, embedding_init=small, rngs=rngs)
        self.positions = nnx.Embed(context, width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List(
            [CausalBlock(width, heads, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps bytes `(n, tokens)` to logits `(n, tokens, 256)` of the next ones."""
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
