"""The bound: the objective that trains a posterior, and the certificate at the end.

With probability at least 1 − δ over n independent examples, for all posteriors Q at
once (Maurer 2004, n ≥ 8):

    kl(r̂(Q) ‖ r(Q)) ≤ (KL(Q‖P) + log(2√n/δ))/n,

r̂ the mean loss of the examples under Q, r that of fresh ones, losses in [0, 1]. r̂ is
itself known by sampling: m independent draws of mean r̃ give `kl(r̃ ‖ r̂) ≤ log(2/δ')/m`
with probability at least 1 − δ'. Both are inverted in turn, and hold together with
probability at least 1 − δ − δ'.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import checks
from dsbp_jax.theory.pac_bayes.gaussian import Family, Gaussian, Prior
from dsbp_jax.theory.pac_bayes.kl import kl_inverse
from dsbp_jax.theory.pac_bayes.noisy import noisy
from dsbp_jax.tracking import Number

# What a prior's log σ are rounded to, and their range: so many priors are bounded at
# once, for the logarithm of their number.
_GRID_STEP, _GRID_LOW, _GRID_HIGH = 0.1, -10.0, 2.0
_GRID_SIZE = round((_GRID_HIGH - _GRID_LOW) / _GRID_STEP) + 1

# Losses may pass one by rounding.
_ROUNDING = 1e-5


class Certificate(NamedTuple):
    """A bound that holds with the confidence asked for, and what it is made of.

    Attributes:
      bound: On r(Q), the mean loss of fresh examples under the posterior.
      sampled: r̃, what was seen of r̂(Q) in the draws.
      empirical: The bound on r̂(Q) that follows.
      divergence: KL(Q‖P) in nats.
      choices: The logarithm of the number of priors, in nats.
      num_examples: n.
      draws: m.
      confidence: 1 − δ − δ'.
    """

    bound: float
    sampled: float
    empirical: float
    divergence: float
    choices: float
    num_examples: int
    draws: int
    confidence: float


def risk_bound(
    empirical: Number, divergence: Number, num_examples: int, *, delta: float
) -> jax.Array:
    """The bound on r(Q) where r̂(Q) is known.

    Args:
      empirical: r̂(Q) in [0, 1], or a bound on it.
      divergence: KL(Q‖P) in nats, that of a choice among priors included.
      num_examples: n, at least 8.
      delta: δ in (0, 1].

    Returns:
      A scalar, differentiable by the first two.

    Raises:
      ValueError: An argument is out of its range.

    References:
      [P] Maurer, A note on the PAC Bayesian theorem, 2004.

    Example:
      >>> print(risk_bound(0.1, 1000.0, 60_000, delta=0.01).round(3))
      0.164
    """
    checks.non_negative("divergence", divergence)
    num_examples = checks.positive_int("num_examples", num_examples, 8)
    checks.in_unit_interval("delta", delta, open_left=True)
    log = math.log(2 * math.sqrt(num_examples) / delta)
    return kl_inverse(empirical, (divergence + log) / num_examples)


def bounded_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, floor: float = 1e-4
) -> jax.Array:
    """`log max(p, floor) / log floor`, a loss in [0, 1] to train a bound on errors by.

    Args:
      logits: Shape `(…, classes)`.
      labels: Integers, shape `(…)`.
      floor: The probability from which on an example cannot count more.

    Returns:
      Losses of shape `(…)`.

    References:
      [P] Pérez-Ortiz et al., Tighter risk certificates for neural networks, 2021.

    Example:
      >>> print(bounded_cross_entropy(jnp.array([0.0, 0.0]), jnp.array(1)).round(4))
      0.0753
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.minimum(losses / -math.log(floor), 1.0)


def bound_objective(
    loss_fn: Callable[..., jax.Array],
    family: Family,
    num_examples: int,
    *,
    delta: float = 0.01,
) -> Callable[..., jax.Array]:
    """A posterior's own bound, as a loss.

    Args:
      loss_fn: `(params, batch) -> ` losses in [0, 1] that have gradients, `(b,)`.
      family: The posterior's form.
      num_examples: n.
      delta: δ in (0, 1].

    Returns:
      `(posterior, prior, key, groups) -> ` scalar, where the leaves of `groups` are
      `(g, b, …)`: one draw of weights for each of g groups of examples. To be
      minimised by the posterior, and by the prior's `log_scales`, whose choice
      `certify` pays for.

    Raises:
      ValueError: An argument is out of its range.

    Example:
      >>> from dsbp_jax.theory import pac_bayes
      >>> family, params = pac_bayes.isotropic(), {"w": jnp.zeros(2)}
      >>> posterior = family.init(params, 0.1)
      >>> prior = pac_bayes.initial_prior(params, 0.1)
      >>> loss_fn = lambda params, x: jnp.full(x.shape, 0.1)
      >>> objective = bound_objective(loss_fn, family, 10_000)
      >>> key, groups = jax.random.key(0), jnp.ones((2, 5))
      >>> print(objective(posterior, prior, key, groups).round(3))
      0.114
    """
    checks.positive_int("num_examples", num_examples, 8)
    checks.in_unit_interval("delta", delta, open_left=True)

    def objective(
        posterior: Gaussian, prior: Prior, key: jax.Array, groups: Any
    ) -> jax.Array:
        count = len(jax.tree.leaves(groups)[0])
        keys = jax.random.split(key, count)
        draw = lambda key, group: noisy(loss_fn, family, posterior, key, group)
        empirical = jnp.mean(jax.vmap(draw)(keys, groups))
        divergence = family.divergence(posterior, prior)
        return risk_bound(empirical, divergence, num_examples, delta=delta)

    return objective


def gibbs_risk(
    loss_fn: Callable[..., jax.Array],
    family: Family,
    posterior: Gaussian,
    examples: Any,
    *,
    key: jax.Array,
    group: int = 1,
    passes: int = 1,
    together: int = 256,
) -> tuple[float, int]:
    """The mean loss of examples under a posterior, by independent draws.

    Args:
      loss_fn: `(params, batch) -> ` losses in [0, 1], `(b,)`.
      family: The posterior's form.
      posterior: Q.
      examples: Their leaves have one leading axis, of n.
      key: A PRNG key.
      group: Examples that share a draw of the leaves that are drawn (`noisy`); divides
        n. The groups' means are then independent, and of equal weight.
      passes: Over the examples, each with draws of its own.
      together: Groups that are computed at once.

    Returns:
      The mean, and the number m of draws.

    Raises:
      ValueError: An argument is out of its range, or a loss is.

    Example:
      >>> from dsbp_jax.theory import pac_bayes
      >>> family = pac_bayes.isotropic()
      >>> posterior = family.init({"w": jnp.zeros(())}, 1.0)
      >>> loss_fn = lambda params, x: (params["w"] > x).astype(jnp.float32)
      >>> risk, draws = gibbs_risk(loss_fn, family, posterior, jnp.zeros(1000),
      ...                          key=jax.random.key(0))
      >>> round(risk, 1), draws
      (0.5, 1000)
    """
    count = _count(examples)
    group = checks.positive_int("group", group)
    passes = checks.positive_int("passes", passes)
    if count % group:
        raise ValueError(f"group must divide the {count} examples, got {group}")
    shape = (count // group, group)
    groups = jax.tree.map(lambda x: jnp.reshape(x, shape + x.shape[1:]), examples)
    found = []
    for one in jax.random.split(key, passes):
        keys = jax.random.split(one, shape[0])
        for first in range(0, shape[0], together):
            part = slice(first, first + together)
            some = jax.tree.map(lambda x, part=part: x[part], groups)
            found.append(_means(family, posterior, keys[part], some, loss_fn))
    sums, lows, highs = np.asarray(jax.device_get(found), np.float64).T
    low, high = lows.min(), highs.max()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"loss_fn must return losses in [0, 1], got {low:.4g} to {high:.4g}"
        )
    draws = passes * shape[0]
    return float(np.clip(sums.sum() / draws, 0, 1)), draws


@functools.partial(jax.jit, static_argnums=4)
def _means(
    family: Family,
    posterior: Gaussian,
    keys: jax.Array,
    groups: Any,
    loss_fn: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of the mean losses of groups, and the least and the largest loss."""
    losses = jax.vmap(lambda key, group: noisy(loss_fn, family, posterior, key, group))(
        keys, groups
    )
    means = jnp.mean(losses.reshape(len(keys), -1), axis=1)
    return jnp.sum(means), jnp.min(losses), jnp.max(losses)


def certify(
    loss_fn: Callable[..., jax.Array],
    family: Family,
    posterior: Gaussian,
    prior: Prior,
    examples: Any,
    *,
    indices: Sequence[int] | np.ndarray,
    key: jax.Array,
    group: int = 1,
    passes: int = 1,
    together: int = 256,
    confidence: float = 0.99,
) -> Certificate:
    """A bound on the loss of fresh examples under a posterior.

    The prior's log σ are rounded to a grid of 121 values, from −10 to 2, that was
    there before any example: so they may be chosen with them in sight, each for
    log 121 nats. Half of what confidence leaves open goes to the draws.

    Args:
      loss_fn: `(params, batch) -> ` losses in [0, 1], `(b,)`, as that an answer is
        wrong.
      family: The posterior's form.
      posterior: Q.
      prior: P.
      examples: Independent ones, on a leading axis of n, that P did not see.
      indices: Their numbers, as in `learned_prior`.
      key: A PRNG key.
      group: As in `gibbs_risk`.
      passes: Likewise.
      together: Likewise.
      confidence: Of the bound, below 1.

    Returns:
      The certificate.

    Raises:
      ValueError: An argument is out of its range; a loss is not in [0, 1]; the prior
        saw an example; or a deviation is zero or not finite.

    References:
      [P] Langford and Caruana 2001; Maurer 2004; Dziugaite and Roy, Computing
      nonvacuous generalization bounds, 2017. METHODS section 9.

    Example:
      >>> from dsbp_jax.theory import pac_bayes
      >>> family, params = pac_bayes.isotropic(), {"w": jnp.zeros(2)}
      >>> posterior = family.init(params, 0.1)
      >>> prior = pac_bayes.initial_prior(params, 0.1)
      >>> loss_fn = lambda params, x: jnp.full(x.shape, 0.1)
      >>> found = certify(loss_fn, family, posterior, prior, jnp.ones(10_000),
      ...                 indices=range(10_000), key=jax.random.key(0))
      >>> print(round(found.empirical, 3), round(found.bound, 3), found.draws)
      0.111 0.129 10000
    """
    count = _count(examples)
    checks.in_unit_interval("confidence", confidence)
    if not confidence < 1:
        raise ValueError(f"confidence must be below 1, got {confidence}")
    numbers = np.asarray(indices)
    if numbers.shape != (count,):
        raise ValueError(
            f"indices must be one number for each of the {count} examples, got shape "
            f"{numbers.shape}"
        )
    both = prior.seen.intersection(numbers.tolist())
    if both:
        raise ValueError(
            "examples must be held out of those that the prior was trained on, got "
            f"{len(both)} that it saw; accepted is a bound on the other half"
        )
    for name, logs in (("posterior", posterior), ("prior", prior)):
        for path, log in logs.log_scales.items():
            if not np.all(np.isfinite(log)):
                raise ValueError(
                    f"{name} must have deviations above 0 and finite, got some of "
                    f"{path!r} that are not: its divergence is infinite"
                )
    rounded, choices = _on_grid(prior)
    delta = (1 - confidence) / 2
    sampled, draws = gibbs_risk(
        loss_fn,
        family,
        posterior,
        examples,
        key=key,
        group=group,
        passes=passes,
        together=together,
    )
    empirical = kl_inverse(sampled, math.log(2 / delta) / draws)
    divergence = float(family.divergence(posterior, rounded))
    # Rounding may leave a divergence of zero below it.
    divergence = max(divergence, 0.0) if math.isfinite(divergence) else math.inf
    bound = 1.0
    if math.isfinite(divergence):
        bound = float(risk_bound(empirical, divergence + choices, count, delta=delta))
    return Certificate(
        bound,
        sampled,
        float(empirical),
        divergence,
        choices,
        count,
        draws,
        confidence,
    )


def _on_grid(prior: Prior) -> tuple[Prior, float]:
    """The prior at the nearest of the priors that are bounded, and the price."""
    rounded = {}
    for path, log in prior.log_scales.items():
        steps = np.round((np.asarray(log, np.float64) - _GRID_LOW) / _GRID_STEP)
        if not 0 <= steps < _GRID_SIZE:
            raise ValueError(
                f"prior must have log σ from {_GRID_LOW:g} to {_GRID_HIGH:g}, got "
                f"{float(log):.3g} of {path!r}"
            )
        rounded[path] = jnp.float32(_GRID_LOW + _GRID_STEP * steps)
    price = len(rounded) * math.log(_GRID_SIZE)
    return Prior(prior.mean, rounded, prior.seen), price


def _count(examples: Any) -> int:
    counts = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(counts) != 1:
        raise ValueError(
            f"examples must have one leading axis, of one length, got {sorted(counts)}"
        )
    return counts.pop()
