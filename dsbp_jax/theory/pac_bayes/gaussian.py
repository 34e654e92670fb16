"""Gaussian posteriors over a network's weights, and the priors they are held against.

The posterior of a kernel with an eigenspace V of its layer is

    W = M + τE + V diag(s − τ)VᵀE,   E standard normal:

a deviation sᵢ along each leading direction, on all entries alike, and τ outside. A loss
is sensitive where inputs are large, so the head wants to be narrow; the tail may be as
wide as the prior, and costs nothing there. With s = τ it is the isotropic posterior.
Scales are logarithms, one number each that any optimizer may move.
"""

import dataclasses
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import checks
from dsbp_jax.layers import leaves_by_path, map_paths
from dsbp_jax.tracking import Eigenspace, Spaces, labelled


class Gaussian(NamedTuple):
    """A posterior; a tree of arrays, all of which may be trained.

    Attributes:
      mean: M, the params.
      log_scales: Path to the logarithms of a leaf's standard deviations.
        # shape=() isotropic, the leaf's diagonal, (*batch, k + 1) in an eigenspace of
        # k columns, the last one outside of it
    """

    mean: optax.Params
    log_scales: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prior:
    """`N(M₀, σ²)`, one σ for each leaf.

    Attributes:
      mean: M₀.
      log_scales: Path to log σ.  # shape=()
      seen: The examples that it depends on, by number; static.
    """

    mean: optax.Params
    log_scales: dict[str, jax.Array]
    seen: frozenset[int] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Family:
    """A form of posterior, and all that it needs besides what is trained.

    Attributes:
      bases: Path to the eigenspace of a leaf; empty of the other forms.
      entrywise: Whether each entry has a deviation of its own; static.
    """

    bases: dict[str, Any]
    entrywise: bool = dataclasses.field(metadata={"static": True})

    def init(self, params: optax.Params, scale: float) -> Gaussian:
        """A posterior around params, all deviations `scale`, which is above 0."""
        checks.positive("scale", scale)
        spaces = self._spaces(params)
        logs = {}
        for path, leaf in leaves_by_path(params).items():
            shape: tuple[int, ...] = jnp.shape(leaf) if self.entrywise else ()
            if path in spaces:
                values = spaces[path].values
                shape = (*values.shape[:-1], values.shape[-1] + 1)
            logs[path] = jnp.full(shape, math.log(scale), jnp.float32)
        return Gaussian(params, logs)

    def sample(
        self, gaussian: Gaussian, key: jax.Array, at_mean: Container[str] = ()
    ) -> optax.Params:
        """One draw.

        Args:
          gaussian: The posterior.
          key: A PRNG key.
          at_mean: Paths of leaves that stay at their mean.
        """
        spaces = self._spaces(gaussian.mean)
        paths = list(leaves_by_path(gaussian.mean))
        keys = dict(zip(paths, jax.random.split(key, len(paths)), strict=True))

        def draw(path: str, mean: jax.Array) -> jax.Array:
            if path in at_mean:
                return mean
            noise = jax.random.normal(keys[path], mean.shape, mean.dtype)
            scales = jnp.exp(gaussian.log_scales[path]).astype(mean.dtype)
            if path in spaces:
                head, tail = scales[..., :-1], scales[..., -1]
                return mean + spaces[path].filter(noise, lambda *_: (head, tail))
            return mean + scales * noise

        return map_paths(draw, gaussian.mean)

    def deviation(
        self, gaussian: Gaussian, path: str, rows: jax.Array
    ) -> jax.Array | None:
        """The standard deviations of `XW` for rows X.

        Args:
          gaussian: The posterior.
          path: Of a kernel `(d_in, d_out)`.
          rows: X, shape `(n, d_in)`.

        Returns:
          Shape `(n, 1)` or `(n, d_out)`; None where what a row gives is not
          independent, as in a space on the output side.
        """
        space = self._spaces(gaussian.mean).get(path)
        variances = jnp.exp(2 * gaussian.log_scales[path]).astype(rows.dtype)
        squares = jnp.square(rows)
        if space is not None:
            if space.side != "input":
                return None
            inside = jnp.square(space.along(rows))
            outside = jnp.sum(squares, axis=-1) - jnp.sum(inside, axis=-1)
            variance = variances[-1] * jnp.maximum(outside, 0)
            variance = (variance + inside @ variances[:-1])[:, None]
        elif self.entrywise:
            variance = squares @ variances
        else:
            variance = variances * jnp.sum(squares, axis=-1, keepdims=True)
        # A row of zeros has no noise, and no derivative of its square root.
        some = variance > 0
        return jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0)

    def divergence(self, gaussian: Gaussian, prior: "Prior") -> jax.Array:
        """`KL(Q‖P)` in nats, a scalar."""
        spaces = self._spaces(gaussian.mean)
        centres = leaves_by_path(prior.mean)
        total = jnp.zeros((), jnp.float32)
        for path, mean in leaves_by_path(gaussian.mean).items():
            logs, log_prior = gaussian.log_scales[path], prior.log_scales[path]
            excess = 2 * (logs - log_prior)
            each = 0.5 * (jnp.expm1(excess) - excess)
            total += jnp.sum(_entries(mean, logs, spaces.get(path)) * each)
            apart = jnp.sum(jnp.square(mean - centres[path])).astype(jnp.float32)
            total += 0.5 * jnp.exp(-2 * log_prior) * apart
        return total

    def _spaces(self, params: optax.Params) -> Mapping[str, Eigenspace]:
        if not self.bases:
            return {}
        found = labelled("bases", self.bases, params)
        return {path: spaces[0] for path, spaces in found.items()}


def initial_prior(params: optax.Params, scale: float) -> Prior:
    """A prior around params that no example had a part in, as fresh ones.

    Args:
      params: M₀.
      scale: σ, above 0.

    Returns:
      The prior.

    Raises:
      ValueError: `scale` is not above 0.

    Example:
      >>> prior = initial_prior({"w": jnp.zeros(2)}, 0.5)
      >>> print(prior.log_scales["w"].round(3))
      -0.693
    """
    return _prior(params, scale, frozenset())


def learned_prior(params: optax.Params, scale: float, seen: Iterable[int]) -> Prior:
    """A prior around params that were trained on some examples.

    Args:
      params: M₀.
      scale: σ, above 0.
      seen: The numbers of those examples; `certify` refuses them.

    Returns:
      The prior.

    Raises:
      ValueError: `scale` is not above 0, or `seen` holds none.

    Example:
      >>> sorted(learned_prior({"w": jnp.zeros(2)}, 0.5, [3, 1]).seen)
      [1, 3]
    """
    numbers = frozenset(np.asarray(list(seen), int).tolist())
    if not numbers:
        raise ValueError(
            "seen must hold the examples that the prior was trained on, got none; a "
            "prior that saw none is an initial_prior"
        )
    return _prior(params, scale, numbers)


def _prior(params: optax.Params, scale: float, seen: frozenset[int]) -> Prior:
    checks.positive("scale", scale)
    return Prior(params, _constant(params, scale), seen)


def _constant(params: optax.Params, scale: float) -> dict[str, jax.Array]:
    log = jnp.log(jnp.float32(scale))
    return dict.fromkeys(leaves_by_path(params), log)


def isotropic() -> Family:
    """One deviation for each leaf.

    Returns:
      The family.

    Example:
      >>> family, params = isotropic(), {"w": jnp.zeros(4)}
      >>> posterior, prior = family.init(params, 0.5), initial_prior(params, 1.0)
      >>> print(family.divergence(posterior, prior).round(3))  # 4(¼ − 1 + log 4)/2
      1.273
    """
    return Family({}, entrywise=False)


def diagonal() -> Family:
    """One deviation for each entry.

    Returns:
      The family.

    References:
      [P] Dziugaite and Roy, 2017.

    Example:
      >>> posterior = diagonal().init({"w": jnp.zeros((4, 2))}, 0.5)
      >>> posterior.log_scales["w"].shape
      (4, 2)
    """
    return Family({}, entrywise=True)


def eigenbasis(bases: Spaces) -> Family:
    """A deviation for each direction of each layer's eigenspace, one for the rest.

    Args:
      bases: Path to eigenspaces, as `dsbp_jax.activation_bases` gives them, one of a
        leaf. Leaves without one have one deviation.

    Returns:
      The family.

    Raises:
      ValueError: In its functions, where the bases do not fit the params.

    References:
      [O] METHODS section 9.

    Example:
      >>> from dsbp_jax.linalg import EigenBasis
      >>> basis = EigenBasis(jnp.eye(3, 1), jnp.ones(1), jnp.ones(()))
      >>> family, params = eigenbasis({"w": basis}), {"w": jnp.zeros((3, 2))}
      >>> posterior = family.init(params, 1.0)
      >>> narrow = posterior._replace(log_scales={"w": jnp.array([-100.0, 0.0])})
      >>> jnp.round(family.sample(narrow, jax.random.key(0))["w"][0] + 0.0).tolist()
      [0.0, 0.0]
    """
    return Family(dict(bases), entrywise=False)


def _entries(
    mean: jax.Array, logs: jax.Array, space: Eigenspace | None
) -> np.ndarray | float:
    """How many independent numbers each deviation belongs to."""
    if space is None:
        return mean.size / logs.size
    # Of each matrix, d of them along every direction of the other side.
    batch, dim = math.prod(logs.shape[:-1]), space.vectors.shape[-2]
    along = mean.size / (batch * dim)
    return np.array([along] * space.rank + [along * (dim - space.rank)], np.float32)
