"""Eigenspaces that are solved for at once, not tracked: of another task's layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax import checks, linalg
from dsbp_jax.layers import LayerActivations, is_further_use
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import with_auto_axes
from dsbp_jax.tracking.eigenspace import SIDES, Eigenspace
from dsbp_jax.tracking.signals import activation_signal


def activation_bases(
    activations: Mapping[str, LayerActivations],
    rank: int,
    *,
    side: str = "input",
    key: jax.Array | None = None,
) -> dict[str, Eigenspace]:
    """The leading eigenspace of every layer's covariance, solved to convergence.

    Args:
      activations: As `dsbp_jax.capture_activations` returns them. Further uses of a
        kernel (`path#1`, …) add their rows to its first.
      rank: Columns k of each basis, d where a layer has only so many dimensions.
      side: `"input"` or `"output"`.
      key: A PRNG key for the random starts; by default a fixed one.

    Returns:
      A dict from canonical path to eigenspace, vectors of shape `(*batch, d, k)`,
      float32; its view is that of the model that the activations were captured from.

    Raises:
      ValueError: An argument is out of its range.

    Example:
      >>> import dsbp_jax
      >>> forward = dsbp_jax.capture_activations(lambda p, x: x @ p["kernel"])
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> _, activations = forward({"kernel": jnp.ones((3, 2))}, x)
      >>> dsbp_jax.activation_bases(activations, rank=1)["kernel"].values.tolist()
      [4.5]
    """
    rank = checks.positive_int("rank", rank)
    checks.one_of("side", side, SIDES)
    key = jax.random.key(0) if key is None else key
    paths = [path for path in activations if not is_further_use(path, activations)]
    run = lambda activations, key: {
        path: _basis(activations, path, rank, side, key) for path in paths
    }
    replicated = EigenBasis(jax.P(), jax.P(), jax.P())  # type: ignore[arg-type]
    found = with_auto_axes(
        run, activations, key, out_specs=lambda: dict.fromkeys(paths, replicated)
    )
    return {
        path: Eigenspace(
            basis,
            jnp.ones(basis.trace.shape, bool),
            activations[path].known_view,
            side,
            "activation",
        )
        for path, basis in found.items()
    }


def _basis(
    activations: Mapping[str, LayerActivations],
    path: str,
    rank: int,
    side: str,
    key: jax.Array,
) -> EigenBasis:
    """The basis of one layer."""
    rows, _ = activations[path].rows(side)
    *batch, _, dim = rows.shape
    shape = (*batch, dim)
    arrays, count, operator = activation_signal(activations, shape, side, path)
    solve: Any = lambda x, count: linalg.top_eigenpairs(
        operator(x, count), min(rank, dim), key=key
    )
    for _ in batch:
        solve = jax.vmap(solve)
    return solve(*arrays, count)
