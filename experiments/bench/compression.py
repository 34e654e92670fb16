"""What cut models cost by the clock, and what it takes to plan the cuts."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsbp_jax import architecture
from experiments import checks, models, process
from experiments.bench.step import HEAD
from experiments.bench.timing import interleave

ROUNDS = 30

# By name: the model, its options, the shape of its images. A pass of one image takes
# two milliseconds or more.
MODELS = {
    "MLP 4096×3": ("mlp", {"hidden": (4096, 4096, 4096)}, (28, 28, 1)),
    "CNN of 64 and 128 channels": (
        "cnn",
        {"channels": (64, 128), "hidden": 2048},
        (32, 32, 3),
    ),
    "ResNet-18 of 32 to 256 channels": ("resnet18", {"width": 32}, (32, 32, 3)),
    "ViT of 6 blocks, 256 wide": (
        "vit",
        {"patch": 4, "dim": 256, "depth": 6, "heads": 8},
        (32, 32, 3),
    ),
}


@dataclasses.dataclass(frozen=True)
class CutConfig:
    """What the benchmark of smaller models measures."""

    models: tuple[str, ...] = tuple(MODELS)
    """Of image classifiers with weights as they are drawn, those to cut."""

    flops: float = 0.5
    """Share of the FLOPs that is kept."""

    batch_sizes: tuple[int, ...] = (256, 1)
    """Images of a pass."""

    width: int = 512
    """Of a Transformer of twelve blocks, of which the plan alone is measured."""

    def __post_init__(self):
        """Checks every value."""
        checks.some("compression.models", self.models)
        for name in self.models:
            checks.one_of("compression.models", name, MODELS)
        checks.between("compression.flops", self.flops, 0, 1)
        checks.counts("compression.batch_sizes", self.batch_sizes, 4096)
        checks.counts("compression.width", (self.width,), 4096)
        if self.width % HEAD:
            raise ValueError(
                f"compression.width={self.width}; accepted are multiples of {HEAD}, "
                "the width of a head"
            )


def classifier(
    kind: str, options: dict[str, Any], shape: tuple[int, ...], count: int
) -> tuple[Callable[..., Any], Any, jax.Array]:
    """Logits as a function of arrays and images, both, and so many of the latter."""
    model = models.build(
        kind, image_shape=shape, num_classes=10, rngs=nnx.Rngs(0), **options
    )
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(arrays: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, arrays["params"], arrays["rest"])(x)

    images = jax.random.normal(jax.random.key(1), (count, *shape))
    return apply, {"params": params, "rest": rest}, images


def cut(name: str, config: CutConfig) -> list[dict[str, Any]]:
    """A model and a smaller one, compiled alike: a row for each batch size."""
    apply, arrays, images = classifier(*MODELS[name], max(config.batch_sizes))
    begin = time.perf_counter()
    plan = architecture.plan(apply, arrays, [images], flops=config.flops)
    taken = time.perf_counter() - begin
    small = architecture.compress(apply, arrays, plan)
    whole, less = jax.jit(apply), jax.jit(small.apply)
    rows = []
    for size in config.batch_sizes:
        times = interleave(
            {
                "whole": functools.partial(whole, arrays, images[:size]),
                "small": functools.partial(less, small.params, images[:size]),
            },
            ROUNDS,
        )
        before, after = (1e3 * float(np.median(x)) for x in times.values())
        rows.append(
            {
                "model": name,
                "images": str(size),
                "FLOPs": plan.flops,
                "parameters": plan.parameters,
                "whole ms": before,
                "small ms": after,
                "small / whole": after / before,
                "plan s": taken,
            }
        )
    return rows


def planned(width: int) -> dict[str, Any]:
    """What the plan of twelve blocks takes, beside a pass of 4,160 tokens."""
    options = {"patch": 4, "dim": width, "depth": 12, "heads": width // HEAD}
    apply, arrays, images = classifier("vit", options, (32, 32, 3), 64)
    jax.block_until_ready(jax.jit(apply)(arrays, images))
    before, begin = process.peak_gigabytes(), time.perf_counter()
    plan = architecture.plan(apply, arrays, [images], flops=0.5)
    taken = time.perf_counter() - begin
    return {
        "model": f"ViT of 12 blocks, {width} wide",
        "images": str(len(images)),
        "FLOPs": plan.flops,
        "plan s": taken,
        "peak GB above a pass": process.peak_gigabytes() - before,
    }


def run(
    config: CutConfig = CutConfig(),
) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    # The plan first, and this benchmark before all others: of a process only the
    # highest peak is known.
    return {
        "What a plan takes": [planned(config.width)],
        f"Models at {config.flops:g} of their FLOPs, weights as drawn": [
            row for name in config.models for row in cut(name, config)
        ],
    }
