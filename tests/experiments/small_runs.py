"""Command lines of runs that take a second, and a model with every kind of state."""

import json

import jax
from flax import nnx

SMALL = [
    *("--epochs", "3"),
    *("--batch-size", "256"),
    *("--model.options", "hidden=16,"),
    *("--optimizer.rank", "8"),
    *("--probe.batch-size", "0"),
]
PROBED = [*SMALL, "--probe.batch-size", "32", "--probe.hessian-steps", "2"]


class Restless(nnx.Module):
    """An MLP with running statistics and random numbers of its own."""

    def __init__(self, image_shape, num_classes, *, hidden=(16,), rngs):
        height, width, channels = image_shape
        self.dense = nnx.Linear(height * width * channels, *hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(*hidden, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(*hidden, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.norm(self.dense(images.reshape(len(images), -1)))
        return self.head(self.dropout(nnx.relu(x)))


def records(folder):
    """The lines of a run's metrics."""
    return [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
