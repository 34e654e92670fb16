"""A task of the engine that needs no data and no network: a noisy parabola.

Its best rate and decay are known, rates above 2 diverge, and a step may take its time.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.study.config import Config
from experiments.study.task import Length, Metric


@dataclasses.dataclass(frozen=True)
class ToyConfig(Config):
    axes: ClassVar[Mapping[str, float]] = {"rate": 3.0, "decay": 5.0}

    steps: int | None = dataclasses.field(default=12, kw_only=True)
    name: str = "plain"
    rate: float = 0.01
    decay: float = 0.0
    pause: float = 0.0
    available: bool = True

    @property
    def label(self):
        return self.name

    @property
    def contender(self):
        return self.name

    @property
    def evaluations(self):
        return 2 if self.name == "twice" else 1

    def with_contender(self, text):
        name, _, rate = text.partition(":")
        config = dataclasses.replace(self, name=name, available=name != "absent")
        return dataclasses.replace(config, rate=float(rate)) if rate else config

    def at(self, point):
        rate = self.rate * 3.0 ** point.get("rate", 0)
        decay = 1e-4 * 5.0 ** point["decay"] / rate if "decay" in point else self.decay
        return dataclasses.replace(self, rate=rate, decay=decay)

    def searched(self):
        return {"rate": self.rate}

    def shared(self):
        return dataclasses.replace(super().shared(), rate=0.0, decay=0.0)

    def smoke(self):
        return dataclasses.replace(self, steps=2)

    def make(self):
        return ToyTask(self)


class ToyState(NamedTuple):
    x: Any
    step: Any


class ToyTask:
    metrics: ClassVar = {
        "error": Metric("m", 9.0),
        "share": Metric("%", 0.5, 100.0, True, 2, True, 50),
    }
    digest = "toy"

    def __init__(self, config):
        if not config.available:
            raise ValueError("data_dir=None; accepted is a folder")
        self.pause = config.pause

    def length(self, config):
        return Length(config.steps, 4)

    def compile(self, config):
        pass

    def init(self, config):
        x = jnp.float32(1 + 0.1 * np.random.default_rng(config.seed).random())
        return ToyState(x, jnp.int32(0))

    def step(self, state, config, number):
        if os.environ.get("TOY_LOG"):
            with open(os.environ["TOY_LOG"], "a", encoding="utf-8") as file:
                file.write(f"{config.name} {config.seed} {config.rate:g} {number}\n")
        time.sleep(self.pause)
        noise = np.random.default_rng((config.seed, number)).normal() * 0.01
        x = state.x - config.rate * (state.x + noise) - config.decay * state.x
        if config.rate > 2:
            x = jnp.float32(np.nan)
        return ToyState(x, state.step + 1), {"loss": x**2}

    def evaluate(self, state, part, config):
        x = float(state.x) + (0.01 if part == "test" else 0)
        return {"loss": x**2, "error": abs(x), "share": math.exp(-abs(x))}

    def observe(self, state):
        return {"bases": {}}, state

    def advice(self, config):
        return f"try a lower rate than {config.rate:g}"
