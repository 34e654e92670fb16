"""Command lines of runs that take a second, and a model with every kind of state."""

import json

import jax
from flax import nnx

SMALL = [
    "digits",
    *("--epochs", "3"),
    *("--batch-size", "256"),
    *("--model.options", "hidden=16,"),
    *("--probe.batch-size", "0"),
]
PROBED = [*SMALL, "--probe.batch-size", "32", "--probe.hessian-steps", "2"]
PROBED += ["--probe.rank", "8"]
DSBP = ["--optimizer", "dsbp:rank=8"]

SMALL_FEWSHOT = [
    "sine",
    *("--steps", "4"),
    *("--outer.tasks", "3"),
    *("--model.options", "hidden=8,"),
    *("--spectral.rank", "3"),
    *("--spectral.refresh-every", "2"),
    *("--inner.steps", "2"),
    *("--eval-every", "2"),
    *("--eval-episodes", "6"),
    *("--test-episodes", "8"),
]


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
