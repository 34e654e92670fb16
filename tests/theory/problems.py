"""Small problems in float64 whose derivatives and moments are known otherwise."""

import jax.numpy as jnp
import numpy as np

from dsbp_jax.linalg import EigenBasis

ANGLE = 0.4
DIRECTIONS = 0.7 * np.array([[0.9, 0.3], [-0.8, 0.6], [-0.2, -1.1]])
_PHASES = 2 * np.pi * np.arange(3) / 3 + ANGLE
#: Of three batches; their sum is zero, and none is ever outweighed near the minimum.
TILTS = 3.0 * np.stack([np.cos(_PHASES), np.sin(_PHASES)], axis=1)
START = np.array([[0.5], [-0.4]])
BOX = [(-1.2, 1.2)] * 2


def loss_fn(params, tilt):
    """`Σ exp(aₖᵀw) + tᵀw` of a kernel (2, 1)."""
    w = params["w"][:, 0]
    return jnp.sum(jnp.exp(jnp.asarray(DIRECTIONS, w.dtype) @ w)) + tilt @ w


def bases():
    """One direction, of eigenvalue 3 of a trace of 4."""
    vector = jnp.array([[np.cos(ANGLE)], [np.sin(ANGLE)]], jnp.float32)
    values = jnp.array([3.0], jnp.float32)
    return {"w": EigenBasis(vector, values, jnp.array(4.0, jnp.float32))}


def moments(points):
    """First and second ones, of points (p, 2)."""
    x, y = points.T
    return np.stack([x, y, x * x, x * y, y * y], axis=1)
