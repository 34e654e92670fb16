"""A problem of two parameters, whose moments are known without sampling."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.linalg import EigenBasis
from dsbp_jax.theory import sde

_ANGLE = 0.4
_DIRECTIONS = 0.7 * np.array([[0.9, 0.3], [-0.8, 0.6], [-0.2, -1.1]])
_PHASES = 2 * np.pi * np.arange(3) / 3 + _ANGLE
_TILTS = 3.0 * np.stack([np.cos(_PHASES), np.sin(_PHASES)], axis=1)
_START = np.array([[0.5], [-0.4]])
_BOX = ((-1.2, 1.2),) * 2


def _loss(params: Any, tilt: jax.Array) -> jax.Array:
    w = params["w"][:, 0]
    return jnp.sum(jnp.exp(jnp.asarray(_DIRECTIONS, w.dtype) @ w)) + tilt @ w


def _bases() -> dict[str, EigenBasis]:
    vector = jnp.array([[math.cos(_ANGLE)], [math.sin(_ANGLE)]], jnp.float32)
    values = jnp.array([3.0], jnp.float32)
    return {"w": EigenBasis(vector, values, jnp.array(4.0, jnp.float32))}


#: By name, each at a radius to be replaced.
METHODS: dict[str, sde.Method] = {
    "sgd": sde.sgd(),
    "sam": sde.sam(0.1),
    "dsbp": sde.dsbp(_bases(), rho=0.1, residual=0.2),
    "whitened": sde.whitened(_bases(), rho=0.1),
}


def _moments(points: np.ndarray) -> np.ndarray:
    x, y = points.T
    return np.stack([x, y, x * x, x * y, y * y], axis=1)


def moments(
    name: str,
    rho: float,
    eta: float,
    order: int | None,
    *,
    nodes: int,
    correction: bool = True,
) -> np.ndarray:
    """Moments at time 1 of an equation, or with order None of its optimizer.

    Args:
      name: Of `METHODS`.
      rho: Its radius.
      eta: Learning rate.
      order: Of the equation, or None.
      nodes: Chebyshev nodes for each of the two parameters.
      correction: Whether the equation has its term in η.

    Returns:
      Those of first and second order, shape `(5,)`.
    """
    equation = sde.modified_equation(
        _loss,
        METHODS[name].at(rho),
        eta,
        order=0 if order is None else order,
        correction=correction,
    )
    return sde.expectations(
        equation,
        {"w": jnp.asarray(_START)},
        jnp.asarray(_TILTS),
        round(1 / eta),
        _moments,
        box=_BOX,
        nodes=nodes,
        of="optimizer" if order is None else "sde",
    )
