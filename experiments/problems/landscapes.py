"""Losses with one trap each: a saddle, a plateau, layers of unequal scales."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.problems.problem import Problem, falling, normal, squares

WIDTH, DEPTH, SMALL = 32, 4, 0.25  # of the deep linear net
INPUTS, UNITS, COMMON, APART = 64, 16, 0.05, 1e-3  # of the committee
SCALES = (10.0, 1.0, 0.1)  # of the layers of unequal scales
HIDDEN = 64
ROWS, EXAMPLES = 64, 4096  # of a step, of an evaluation


def saddle() -> Problem:
    """A deep linear net that begins beside the saddle at zero.

    `‖W₁W₂W₃W₄ − M‖²` over `‖M‖²`, where the singular values of M fall from 1 to 0.01.
    They are learned one after the other, the largest first.

    References:
      [P] Saxe et al., Exact solutions to the nonlinear dynamics of learning in deep
        linear neural networks, arXiv 1312.6120.
    """
    rng = np.random.default_rng(3)
    wanted = falling(WIDTH, 0.01, rng)
    whole = jnp.eye(WIDTH), jnp.asarray(wanted)
    largest = float(np.mean(wanted**2))
    shapes = {f"layer_{at}": (WIDTH, WIDTH) for at in range(DEPTH)}

    def loss(params, x, y):
        for name in shapes:
            x = x @ params[name]
        return squares(x, y) / largest

    return Problem(
        init=lambda key: normal(key, SMALL, **shapes),
        loss=loss,
        batch=lambda seed, number: whole,
        measure=loss,
        parts={"validation": whole, "test": whole},
        steps=1000,
        network=False,
    )


def _fresh(seen, teacher):
    """Batches and parts of normal inputs with the answers of a teacher."""

    def drawn(rng, rows):
        x = rng.standard_normal((rows, seen), np.float32)
        return x, teacher(x).astype(np.float32)

    parts = np.random.default_rng(4)
    batch = lambda seed, number: drawn(np.random.default_rng((seed, number)), ROWS)
    found = {part: drawn(parts, EXAMPLES) for part in ("validation", "test")}
    return batch, found, float(np.var(found["test"][1]))


def plateau() -> Problem:
    """A soft committee machine whose units begin almost alike.

    `Σₖ tanh(wₖ·x)` learns a sum over as many orthogonal teachers. While the units are
    alike they have one gradient, and the loss stays where one unit for all is best.

    References:
      [P] Saad and Solla, On-line learning in soft committee machines, Physical Review
        E 52 (1995).
    """
    rng = np.random.default_rng(5)
    best = np.linalg.qr(rng.normal(size=(INPUTS, UNITS)))[0].astype(np.float32)
    batch, parts, largest = _fresh(INPUTS, lambda x: np.tanh(x @ best).sum(-1))

    def init(key):
        common, own = normal(key, one=(INPUTS, 1), each=(INPUTS, UNITS)).values()
        return {"units": COMMON * common + APART * own}

    def loss(params, x, y):
        return squares(jnp.tanh(x @ params["units"]).sum(-1), y) / largest

    return Problem(
        init=init,
        loss=loss,
        batch=batch,
        measure=loss,
        parts=parts,
        steps=1000,
        unit="of the variance",
        network=False,
    )


def unequal_scales() -> Problem:
    """A network whose layers have weights a hundred times as large as others.

    Each layer multiplies its kernel by a factor of its own, 10, 1 and 0.1, and begins
    divided by it: the function is that of a usual network, its gradients are not.
    """
    rng = np.random.default_rng(6)
    first = rng.normal(size=(INPUTS, UNITS)) / INPUTS**0.5
    second = rng.normal(size=(UNITS, UNITS)) / UNITS**0.5
    teacher = lambda x: np.tanh(np.tanh(x @ first) @ second)
    batch, parts, largest = _fresh(INPUTS, teacher)
    shapes = {
        "first": (INPUTS, HIDDEN),
        "second": (HIDDEN, HIDDEN),
        "third": (HIDDEN, UNITS),
    }

    def init(key):
        kernels = normal(key, **shapes)
        pairs = zip(kernels.items(), SCALES, strict=True)
        return {name: kernel / scale for (name, kernel), scale in pairs}

    def loss(params, x, y):
        one, two, three = SCALES
        x = jax.nn.relu(one * (x @ params["first"]))
        x = jax.nn.relu(two * (x @ params["second"]))
        return squares(three * (x @ params["third"]), y) / largest

    return Problem(
        init=init,
        loss=loss,
        batch=batch,
        measure=loss,
        parts=parts,
        steps=1000,
        unit="of the variance",
    )
