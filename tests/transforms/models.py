"""Small parameter trees and problems that the transform tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax import Layout, MatrixView

SHAPES = {
    "dense": (12, 10),
    "conv": (3, 3, 6, 8),
    "attention": (12, 2, 5),
    "stacked": (3, 10, 8),
    "square": (10, 10),
    "stored (out, in)": (10, 12),
    "with#mark": (12, 10),
}

LAYOUT = Layout(
    (
        ("attention", MatrixView((0,), (1, 2))),
        ("conv", MatrixView((2,), (3,))),
        ("dense", MatrixView((0,), (1,))),
        ("stacked", MatrixView((1,), (2,), (0,))),
        ("square", MatrixView((0,), (1,))),
        ("stored (out, in)", MatrixView((1,), (0,))),
        ("with#mark", MatrixView((0,), (1,))),
    )
)


def params(dtype=jnp.float32, seed=0):
    """One leaf of every kind, a bias, and a hole."""
    generator = np.random.default_rng(seed)
    tree = {
        name: generator.normal(size=shape) * 0.5 ** np.arange(shape[-1])
        for name, shape in SHAPES.items()
    }
    tree |= {"bias": np.ones(7), "hole": None, "empty": np.zeros((0, 4))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(dtype)), tree)


def loss_fn(tree):
    """A strongly convex loss with its minimum at 1."""
    weights = {name: jnp.arange(1, shape[-1] + 1) for name, shape in SHAPES.items()}
    total = jnp.sum((tree["bias"].astype(jnp.float32) - 1) ** 2)
    for name, weight in weights.items():
        total += jnp.sum(
            weight.astype(jnp.float32) / 10 * (tree[name].astype(jnp.float32) - 1) ** 2
        )
    return total
