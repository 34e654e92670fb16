"""Networks on small data: a table, digits, text, sums."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import data
from experiments.data import digits as digit_images, text as texts
from experiments.models.cnn import CNN
from experiments.models.language import BYTES
from experiments.problems.problem import Problem, normal, squares

COLUMNS, ROWS, HELD, NOISE = 10, 4000, 2000, 1.0  # of the table
HIDDEN = 64
BATCH = 64
CONTEXT, WINDOWS, HELD_WINDOWS = 24, 16, 512
MODULUS, SEEN = 31, 0.7  # of all pairs


def _some(rows, size, *arrays):
    """Batches of rows at random."""

    def batch(seed, number):
        chosen = np.random.default_rng((seed, number)).integers(0, rows, size)
        return tuple(array[chosen] for array in arrays)

    return batch


def _entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _relu_layers(params, x, names):
    for name in names:
        x = jax.nn.relu(x @ params[name] + params[f"{name}_bias"])
    return x


def table() -> Problem:
    """Regression on a table of ten columns: Friedman's first function.

    `10 sin(πx₁x₂) + 20(x₃ − ½)² + 10x₄ + 5x₅` with noise, and five columns that say
    nothing. It is judged without noise.

    References:
      [P] Friedman, Multivariate Adaptive Regression Splines, Annals of Statistics 19
        (1991).
    """
    rng = np.random.default_rng(7)

    def drawn(rows):
        x = rng.random((rows, COLUMNS), np.float32)
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
        return x, (y + 10 * x[:, 3] + 5 * x[:, 4])[:, None].astype(np.float32)

    x, y = drawn(ROWS)
    mean, deviation = y.mean(), y.std()
    noise = rng.standard_normal(y.shape, np.float32)
    scaled = lambda x, y: (2 * x - 1, (y - mean) / deviation)
    batch = _some(ROWS, BATCH, *scaled(x, y + np.float32(NOISE) * noise))

    def init(key):
        kernels = normal(
            key,
            2**0.5,
            first=(COLUMNS, HIDDEN),
            second=(HIDDEN, HIDDEN),
            head=(HIDDEN, 1),
        )
        biases = {f"{name}_bias": jnp.zeros(HIDDEN) for name in ("first", "second")}
        return kernels | biases | {"head_bias": jnp.zeros(1)}

    def loss(params, x, y):
        x = _relu_layers(params, x, ("first", "second"))
        return squares(x @ params["head"] + params["head_bias"], y)

    return Problem(
        init=init,
        loss=loss,
        batch=batch,
        measure=loss,
        parts={part: scaled(*drawn(HELD)) for part in ("validation", "test")},
        steps=1000,
        unit="of the variance",
    )


def digits() -> Problem:
    """A convolutional network on scikit-learn's digits, 8 × 8 pixels."""
    images = digit_images.load(seed=0)
    build = lambda key: CNN(
        images.image_shape,
        images.num_classes,
        channels=(16, 32),
        hidden=HIDDEN,
        rngs=nnx.Rngs(key),
    )
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))
    ready = lambda split: (
        np.asarray(data.normalize(split.images, images)),
        split.labels,
    )

    def loss(params, x, labels):
        return _entropy(nnx.merge(graph, params, copy=True)(x), labels)

    return Problem(
        init=lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param)),
        loss=loss,
        batch=_some(len(images.train), BATCH, *ready(images.train)),
        measure=loss,
        parts={part: ready(getattr(images, part)) for part in ("validation", "test")},
        steps=400,
        chance=math.log(images.num_classes),
        unit="nats",
    )


_text = functools.lru_cache(maxsize=1)(texts.standard_library)


def characters() -> Problem:
    """A recurrent network on the source of Python's standard library, byte by byte."""
    text = _text()

    def windows(part, count, seed):
        found = texts.windows(getattr(text, part), count, CONTEXT + 1, seed)
        return (found.astype(np.int32),)

    def init(key):
        kernels = normal(
            key,
            embedding=(BYTES, HIDDEN),
            inputs=(HIDDEN, HIDDEN),
            recurrent=(HIDDEN, HIDDEN),
            head=(HIDDEN, BYTES),
        )
        return kernels | {"bias": jnp.zeros(HIDDEN), "head_bias": jnp.zeros(BYTES)}

    def loss(params, windows):
        inputs = params["embedding"][windows[:, :-1]] * BYTES**0.5
        driven = inputs @ params["inputs"] + params["bias"]
        h, states = jnp.zeros_like(driven[:, 0]), []
        for at in range(CONTEXT):
            h = jnp.tanh(driven[:, at] + h @ params["recurrent"])
            states.append(h)
        logits = jnp.stack(states, axis=1) @ params["head"] + params["head_bias"]
        return _entropy(logits, windows[:, 1:])

    return Problem(
        init=init,
        loss=loss,
        batch=lambda seed, number: windows("train", WINDOWS, (seed, number)),
        measure=loss,
        parts={part: windows(part, HELD_WINDOWS, 0) for part in ("validation", "test")},
        steps=600,
        chance=math.log(BYTES),
        unit="nats per byte",
        digest=text.digest,
    )


def modular_sum() -> Problem:
    """Sums of two numbers modulo 31, of which seven pairs in ten are seen.

    A layer of squares, the answers as squared errors. It is judged on all pairs: those
    not seen get worse while the others are learned by heart, and better some time after
    it.

    References:
      [P] Gromov, Grokking modular arithmetic, arXiv 2301.02679.
    """
    pairs = np.random.default_rng(8).permutation(MODULUS**2)
    one_hot = np.eye(MODULUS, dtype=np.float32)
    left, right = one_hot[pairs // MODULUS], one_hot[pairs % MODULUS]
    answers = one_hot[(pairs // MODULUS + pairs % MODULUS) % MODULUS]
    whole = jnp.concatenate([left, right], axis=1), jnp.asarray(answers)
    count = round(SEEN * len(pairs))
    seen = whole[0][:count], whole[1][:count]

    def loss(params, x, y):
        x = (x @ params["first"]) ** 2
        return squares(x @ params["head"], y) * MODULUS

    return Problem(
        init=lambda key: normal(
            key, first=(2 * MODULUS, 2 * HIDDEN), head=(2 * HIDDEN, MODULUS)
        ),
        loss=loss,
        batch=lambda seed, number: seen,
        measure=loss,
        parts={"validation": whole, "test": whole},
        steps=1000,
        network=False,
    )
