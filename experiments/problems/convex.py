"""Linear models: a valley with steep walls, steps that see noise, rare classes."""

import jax.numpy as jnp
import numpy as np
import optax

from experiments.problems.problem import Problem, falling, normal, squares

WIDTH, OUTPUTS = 64, 48
CONDITION, NOISY_CONDITION = 1e6, 1e2  # of the inputs' covariances
NOISY_ROWS, NOISE = 8, 1.0
CLASSES, RARE_ROWS, SPREAD = 256, 128, 2.5
EXAMPLES = 4096  # of an evaluation


def _best(rng: np.random.Generator) -> np.ndarray:
    """The weights behind the targets, entries about as large as a network's."""
    return rng.normal(size=(WIDTH, OUTPUTS)).astype(np.float32) / WIDTH**0.5


def ill_conditioned() -> Problem:
    """Linear regression of many outputs on inputs of condition number 1,000,000.

    `‖X(W − W*)‖²`, without noise, over that of `W = 0`. All rows are in each step.
    """
    rng = np.random.default_rng(0)
    x = falling(WIDTH, CONDITION**-0.5, rng)
    y = x @ _best(rng)
    whole = jnp.asarray(x), jnp.asarray(y)
    largest = float(np.mean(y**2))

    def loss(params, x, y):
        return squares(x @ params["kernel"], y) / largest

    return Problem(
        init=lambda key: normal(key, 0.1, kernel=(WIDTH, OUTPUTS)),
        loss=loss,
        batch=lambda seed, number: whole,
        measure=loss,
        parts={"validation": whole, "test": whole},
        steps=1000,
        network=False,
    )


def noisy() -> Problem:
    """Linear regression of which a step sees eight rows, with noise in their targets.

    It counts how far the expected loss is above its least, over that of `W = 0`.
    """
    rng = np.random.default_rng(1)
    root = falling(WIDTH, NOISY_CONDITION**-0.5, rng)
    best = _best(rng)
    whole = jnp.asarray(root), jnp.asarray(root @ best)
    largest = float(np.mean((root @ best) ** 2))
    level = NOISE * (largest * WIDTH) ** 0.5  # as large as what there is to learn

    def batch(seed, number):
        rng = np.random.default_rng((seed, number))
        x = rng.standard_normal((NOISY_ROWS, WIDTH), np.float32) @ root
        noise = rng.standard_normal((NOISY_ROWS, OUTPUTS), np.float32)
        return x, x @ best + np.float32(level) * noise

    def loss(params, x, y):
        return squares(x @ params["kernel"], y) / (largest * WIDTH)

    def measure(params, root, y):
        return squares(root @ params["kernel"], y) / largest

    return Problem(
        init=lambda key: normal(key, 0.1, kernel=(WIDTH, OUTPUTS)),
        loss=loss,
        batch=batch,
        measure=measure,
        parts={"validation": whole, "test": whole},
        steps=1000,
        network=False,
    )


def rare_classes() -> Problem:
    """Softmax regression on classes of which the k-th has a share of 1/k (Zipf).

    References:
      [P] Kunstner et al., Heavy-Tailed Class Imbalance and Why Adam Outperforms
        Gradient Descent on Language Models, arXiv 2402.19449.
    """
    rng = np.random.default_rng(2)
    means = rng.standard_normal((CLASSES, WIDTH), np.float32)
    shares = 1 / np.arange(1, CLASSES + 1)
    shares /= shares.sum()
    below = np.cumsum(shares)

    def drawn(rng, rows):
        labels = np.searchsorted(below, rng.random(rows)).clip(max=CLASSES - 1)
        noise = rng.standard_normal((rows, WIDTH), np.float32)
        return means[labels] + np.float32(SPREAD) * noise, labels.astype(np.int32)

    def loss(params, x, labels):
        logits = x @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def init(key):
        bias = jnp.zeros(CLASSES)
        return normal(key, 0.1, kernel=(WIDTH, CLASSES)) | {"bias": bias}

    return Problem(
        init=init,
        loss=loss,
        batch=lambda seed, number: drawn(
            np.random.default_rng((seed, number)), RARE_ROWS
        ),
        measure=loss,
        parts={"validation": drawn(rng, EXAMPLES), "test": drawn(rng, EXAMPLES)},
        steps=1000,
        chance=float(-(shares * np.log(shares)).sum()),
        unit="nats",
        network=False,
    )
