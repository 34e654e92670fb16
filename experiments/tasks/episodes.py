"""Tasks by the batch: drawn on the host, built on the device.

`draw` returns small arrays that depend on `(seed, part, step)` alone, so a run that
goes on sees what it would have seen; `build`, inside of a compiled step, turns them
into `(support, query)`. Examples alternate between the classes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import FewShotSet
from experiments.fewshot_config import SINE, FewshotConfig

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Sine:
    """Waves `a sin(x + b)` on [−5, 5], a in [0.1, 5], b in [0, π], as in MAML's paper.

    Attributes:
      shots: Points to adapt to.
      queries: Points to be judged by.
    """

    shots: int
    queries: int
    shape = (1,)
    outputs = 1

    def arrays(self, part: str) -> tuple:
        """Nothing lies on the device."""
        del part
        return ()

    def draw(self, part: str, tasks: int, *, seed: int, step: int) -> dict:
        """Amplitudes and phases of shape `(task, 1, 1)`, and points."""
        rng = np.random.default_rng((seed, PARTS.index(part), step))
        points = (tasks, self.shots + self.queries, 1)
        drawn = {
            "amplitude": rng.uniform(0.1, 5, (tasks, 1, 1)),
            "phase": rng.uniform(0, np.pi, (tasks, 1, 1)),
            "x": rng.uniform(-5, 5, points),
        }
        return {name: values.astype(np.float32) for name, values in drawn.items()}

    def build(self, arrays: tuple, drawn: dict) -> tuple:
        """`(support, query)`, each of `x` and `y` `(task, example, 1)`."""
        del arrays
        y = drawn["amplitude"] * jnp.sin(drawn["x"] + drawn["phase"])
        both = drawn["x"], y
        support = jax.tree.map(lambda values: values[:, : self.shots], both)
        return support, jax.tree.map(lambda values: values[:, self.shots :], both)


@dataclasses.dataclass(frozen=True)
class Images:
    """Classification of a few classes of a set by a few examples of each.

    Attributes:
      dataset: The set.
      ways: Classes of a task.
      shots: Examples of each to adapt to.
      queries: Examples of each to be judged by.

    Raises:
      ValueError: A part has fewer classes or a class fewer examples.
    """

    dataset: FewShotSet
    ways: int
    shots: int
    queries: int

    def __post_init__(self):
        """Checks that there are such tasks."""
        for part in PARTS:
            classes, examples = self._split(part).shape[:2]
            if self.ways > classes:
                raise ValueError(
                    f"ways={self.ways}; accepted are 2 to {classes}, the classes for "
                    f"{part} of {self.dataset.name}"
                )
            if self.shots + self.queries > examples:
                raise ValueError(
                    f"shots={self.shots} with queries={self.queries}; accepted are "
                    f"{examples} or fewer together, the images of a class for {part} "
                    f"of {self.dataset.name}"
                )

    def _split(self, part: str) -> np.ndarray:
        return getattr(self.dataset, part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.dataset.train.shape[2:]

    @property
    def outputs(self) -> int:
        """Of the network."""
        return self.ways

    def arrays(self, part: str) -> jax.Array:
        """The images of a part, on the device."""
        return jnp.asarray(self._split(part))

    def draw(self, part: str, tasks: int, *, seed: int, step: int) -> dict:
        """Classes `(task, way)` and examples `(task, way, example)` of each."""
        rng = np.random.default_rng((seed, PARTS.index(part), step))
        classes, examples = self._split(part).shape[:2]
        # A few of many classes are chosen task by task: no need to order them all.
        chosen = [rng.choice(classes, self.ways, replace=False) for _ in range(tasks)]
        order = np.argsort(rng.random((tasks, self.ways, examples), np.float32))
        return {
            "classes": np.array(chosen, np.int32),
            "examples": order[..., : self.shots + self.queries].astype(np.int32),
        }

    def build(self, arrays: jax.Array, drawn: dict) -> tuple:
        """`(support, query)`, each of images and labels `(task, example, …)`."""
        images = arrays[drawn["classes"][..., None], drawn["examples"]]
        mean, std = (
            jnp.asarray(255 * x) for x in (self.dataset.mean, self.dataset.std)
        )
        images = (jnp.moveaxis(images, 2, 1).astype(jnp.float32) - mean) / std
        labels = jnp.broadcast_to(jnp.arange(self.ways), images.shape[:3])
        parts = slice(None, self.shots), slice(self.shots, None)
        return tuple(
            (flatten(images[:, part]), flatten(labels[:, part])) for part in parts
        )


def flatten(x: jax.Array) -> jax.Array:
    """The second and third axis as one."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def make_episodes(
    config: FewshotConfig, dataset: FewShotSet | None, *, training: bool = False
) -> Any:
    """The tasks of an experiment.

    Args:
      config: The experiment.
      dataset: Its images; None for sine.
      training: Whether those of training, where reptile wants more examples.

    Returns:
      `Sine` or `Images`.

    Raises:
      ValueError: The set has too few classes or images.
    """
    queries = config.queries or config.shots
    if training:
        queries = config.train_examples - config.shots
    if config.data.name == SINE:
        return Sine(config.shots, queries)
    return Images(dataset, config.ways, config.shots, queries)
