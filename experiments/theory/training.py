"""Networks to certify, and the training of posteriors around them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsbp_jax
from dsbp_jax import linalg
from dsbp_jax.theory import pac_bayes

RANK = 32
_BATCH = 250
_GROUPS = 5  # of a batch, each with a draw of its own
_LABELS = {"mean": "mean", "scales": "scale", "prior": "scale"}


def init(seed: int, hidden: int, inputs: int = 784, classes: int = 10) -> Any:
    """Fresh params of a network with one hidden layer."""
    keys = jax.random.split(jax.random.key(seed))
    normal = jax.nn.initializers.he_normal()
    layer = lambda key, *shape: {
        "kernel": normal(key, shape),
        "bias": jnp.zeros(shape[-1:]),
    }
    return {
        "first": layer(keys[0], inputs, hidden),
        "head": layer(keys[1], hidden, classes),
    }


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Logits."""
    first, head = params["first"], params["head"]
    hidden = jax.nn.relu(x @ first["kernel"] + first["bias"])
    return hidden @ head["kernel"] + head["bias"]


def errors(params: Any, batch: Any) -> jax.Array:
    """One where an answer is wrong, shape `(b,)`."""
    x, y = batch
    return (forward(params, x).argmax(-1) != y).astype(jnp.float32)


def surrogate(params: Any, batch: Any) -> jax.Array:
    """Bounded cross entropies, shape `(b,)`."""
    x, y = batch
    return pac_bayes.bounded_cross_entropy(forward(params, x), y)


def cross_entropy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean."""
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y)
    return losses.mean()


#: Optimizers by name, from a schedule: with momentum 0.9, all at one rate.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "spectral_decay": lambda rate: optax.chain(
        dsbp_jax.add_spectral_decay(1e-3), optax.sgd(rate, momentum=0.9)
    ),
    "sam": lambda rate: dsbp_jax.spectral_sam(
        optax.sgd(rate, momentum=0.9), 0.05, mode="full"
    ),
    "dsbp_sam": lambda rate: dsbp_jax.spectral_sam(dsbp_jax.dsbp(rate, RANK), 0.05),
}


def batches(
    x: np.ndarray, y: np.ndarray, epochs: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of some epochs; the rest of an epoch is left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - _BATCH + 1, _BATCH):
            index = order[start : start + _BATCH]
            yield x[index], y[index]


def train(
    name: str, params: Any, x: np.ndarray, y: np.ndarray, epochs: int, seed: int
) -> Any:
    """Params after some epochs of one of `OPTIMIZERS`.

    Args:
      name: Which.
      params: The start.
      x: Images `(n, 784)`.
      y: Labels `(n,)`.
      epochs: Passes.
      seed: Of the order.

    Returns:
      The params.
    """
    tx, step = _step(name, epochs * (len(x) // _BATCH))
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for images, labels in batches(x, y, epochs, seed):
        params, state = step(params, state, images, labels)
    return params


@functools.lru_cache
def _step(name: str, steps: int) -> tuple[Any, Callable[..., Any]]:
    """An optimizer for so many steps, and its step, compiled once."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, steps // 20, steps)
    tx = optax.with_extra_args_support(OPTIMIZERS[name](schedule))
    captures, perturbs = name == "spectral_decay", name in ("sam", "dsbp_sam")
    loss: Any = cross_entropy
    if captures:
        loss = dsbp_jax.capture_activations(cross_entropy, which=("outputs",))
    gradient = jax.grad(loss, has_aux=captures)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        grads, extra = gradient(params, x, y), {}
        if captures:
            grads, extra["activations"] = grads
        if perturbs:
            extra["grad_fn"] = lambda params, _: gradient(params, x, y)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, step


def bases(params: Any, x: np.ndarray) -> dict[str, dsbp_jax.tracking.Eigenspace]:
    """The eigenspaces of what each layer meets."""
    return _bases(params, x)


@jax.jit
def _bases(params: Any, x: jax.Array) -> dict[str, dsbp_jax.tracking.Eigenspace]:
    capture = dsbp_jax.capture_activations(forward, which=("inputs",))
    return dsbp_jax.activation_bases(capture(params, x)[1], RANK)


def sharpness(params: Any, x: np.ndarray, y: np.ndarray) -> float:
    """The top eigenvalue of the Hessian of the cross entropy of some examples."""
    return float(_sharpness(params, x, y))


@jax.jit
def _sharpness(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    operator = linalg.hessian(cross_entropy, params, x, y)
    return linalg.top_eigenpairs(operator, 1, key=jax.random.key(0)).values[0]


def train_posterior(
    family: pac_bayes.Family,
    posterior: pac_bayes.Gaussian,
    prior: pac_bayes.Prior,
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_examples: int,
    epochs: int,
    seed: int,
    scale_rate: float = 0.02,
    moves_mean: bool = True,
) -> tuple[pac_bayes.Gaussian, pac_bayes.Prior]:
    """A posterior, and its prior's scales, trained by the bound.

    Args:
      family: Its form.
      posterior: The start.
      prior: The prior.
      x: Images that it is trained on.
      y: Their labels.
      num_examples: Those of the bound.
      epochs: Passes.
      seed: Of order and draws.
      scale_rate: Adam's peak rate for the scales; that of the mean is 0.001.
      moves_mean: Whether its mean is trained, or its scales alone.

    Returns:
      Both.
    """
    steps = epochs * (len(x) // _BATCH)
    tx, step = _posterior_step(num_examples, steps, scale_rate, moves_mean)
    moved = {
        "mean": posterior.mean,
        "scales": posterior.log_scales,
        "prior": prior.log_scales,
    }
    state = tx.init(moved)
    keys = jax.random.split(jax.random.key(seed), steps)
    for key, batch in zip(keys, batches(x, y, epochs, seed), strict=True):
        moved, state = step(moved, state, family, prior.mean, key, batch)
    return (
        pac_bayes.Gaussian(moved["mean"], moved["scales"]),
        pac_bayes.Prior(prior.mean, moved["prior"], prior.seen),
    )


@functools.lru_cache
def _posterior_step(
    num_examples: int, steps: int, scale_rate: float, moves_mean: bool
) -> tuple[Any, Callable[..., Any]]:
    """The optimizer of a posterior and its step, compiled once for each form."""
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps))
    tx = optax.partition(
        {
            "mean": adam(1e-3) if moves_mean else optax.set_to_zero(),
            "scale": adam(scale_rate),
        },
        lambda moved: {
            name: jax.tree.map(lambda _, name=name: _LABELS[name], value)
            for name, value in moved.items()
        },
    )

    @jax.jit
    def step(
        moved: Any, state: Any, family: Any, centre: Any, key: jax.Array, batch: Any
    ) -> Any:
        objective = pac_bayes.bound_objective(surrogate, family, num_examples)
        groups = jax.tree.map(
            lambda leaf: leaf.reshape(_GROUPS, -1, *leaf.shape[1:]), batch
        )

        def loss(moved: Any) -> jax.Array:
            posterior = pac_bayes.Gaussian(moved["mean"], moved["scales"])
            # What a prior has seen is no matter of the objective.
            prior = pac_bayes.Prior(centre, moved["prior"], frozenset())
            return objective(posterior, prior, key, groups)

        updates, state = tx.update(jax.grad(loss)(moved), state, moved)
        return optax.apply_updates(moved, updates), state

    return tx, step
