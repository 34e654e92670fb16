"""Bases that are given, not tracked: of another task's layers, or kept elsewhere."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax import checks, linalg
from dsbp_jax.layers import (
    LayerActivations,
    MatrixView,
    leaves_by_path,
    map_paths,
    require_paths,
)
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import with_auto_axes
from dsbp_jax.tracking.eigenspace import project_matrix
from dsbp_jax.tracking.signals import SIDES, activation_signal


def activation_bases(
    activations: Mapping[str, LayerActivations],
    rank: int,
    *,
    side: str = "input",
    key: jax.Array | None = None,
) -> dict[str, EigenBasis]:
    """The leading eigenpairs of every layer's covariance, solved to convergence.

    Args:
      activations: As `dsbp_jax.capture_activations` returns them. Further uses of a
        kernel (`path#1`, …) add their rows to its first.
      rank: Columns k of each basis, d where a layer has only so many dimensions.
      side: `"input"` or `"output"`.
      key: A PRNG key for the random starts; by default a fixed one.

    Returns:
      A dict from canonical path to basis, vectors of shape `(*batch, d, k)`, float32.

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
    paths = [path for path in activations if "#" not in path]
    run = lambda activations, key: {
        path: _basis(activations, path, rank, side, key) for path in paths
    }
    replicated = EigenBasis(jax.P(), jax.P(), jax.P())  # type: ignore[arg-type]
    return with_auto_axes(
        run, activations, key, out_specs=lambda: dict.fromkeys(paths, replicated)
    )


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
    form = EigenBasis(
        jnp.zeros((*batch, dim, 1)), jnp.zeros((*batch, 1)), jnp.zeros(batch)
    )
    arrays, count, operator = activation_signal(activations, form, side, path)
    solve: Any = lambda x, count: linalg.top_eigenpairs(
        operator(x, count), min(rank, dim), key=key
    )
    for _ in batch:
        solve = jax.vmap(solve)
    return solve(*arrays, count)


def require_some(name: str, bases: Mapping[str, EigenBasis]) -> None:
    """Raises where there is no basis at all, as of a side that nothing tracks.

    Example:
      >>> require_some("source_bases", {})
      Traceback (most recent call last):
      ...
      ValueError: source_bases must hold the basis of at least one leaf, got none
    """
    if not bases:
        raise ValueError(f"{name} must hold the basis of at least one leaf, got none")


def check_bases(
    name: str,
    bases: Mapping[str, EigenBasis],
    params: Any,
    views: Mapping[str, MatrixView],
    side: str,
    rank: int = 1,
) -> None:
    """Raises unless the bases of the params' leaves have the shape that they need.

    Bases of other leaves are ignored, as under a mask; of none, an error.

    Args:
      name: What the bases were passed as, for the message.
      bases: By canonical path.
      params: The params.
      views: The matrix views of their leaves.
      side: The side that the bases are of.
      rank: The columns that each must have at least.

    Raises:
      ValueError: A basis has another shape, or none belongs to the params.

    Example:
      >>> from dsbp_jax.layers import guess_view
      >>> basis = EigenBasis(jnp.eye(3, 1), jnp.ones(1), jnp.ones(()))
      >>> kernel = jnp.ones((4, 2))
      >>> views = {"w": guess_view((4, 2))}
      >>> check_bases("bases", {"w": basis}, {"w": kernel}, views, "input")
      Traceback (most recent call last):
      ...
      ValueError: bases of 'w' must have vectors of shape (4, k) with k of at least 1...
    """
    if bases and not any(path in views for path in bases):
        require_paths(list(bases)[:1], views, "the layout of the params")
    for path, leaf in leaves_by_path(params).items():
        if path not in bases or path not in views:
            continue
        shape = views[path].matrix_shape(leaf.shape)
        expected = (*shape[:-3], shape[-2 + SIDES.index(side)])
        actual = bases[path].vectors.shape
        if actual[:-1] != expected or actual[-1] < rank:
            raise ValueError(
                f"{name} of {path!r} must have vectors of shape "
                f"({', '.join(map(str, expected))}, k) with k of at least {rank}, got "
                f"{actual}"
            )


def project_on(
    tree: Any,
    bases: Mapping[str, EigenBasis],
    views: Mapping[str, MatrixView],
    side: str,
    *,
    energy: float | jax.Array | None = None,
    away: bool = False,
) -> Any:
    """Projects the leaves that have a basis on it, or on what is orthogonal to it.

    Args:
      tree: Gradients; leaves without a basis, or with one that has seen no signal
        yet, pass through.
      bases: By canonical path.
      views: The matrix views of the leaves.
      side: The side that the bases are of.
      energy: Use the leading columns with this share of the trace only.
      away: Whether what is inside is left out, and not what is outside.

    Returns:
      The projected tree, dtypes kept.
    """

    def change(path: str, leaf: jax.Array) -> jax.Array:
        if path not in bases or path not in views:
            return leaf
        view = views[path]
        matrix = view.to_matrix(leaf).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            inside = project_matrix(matrix, bases[path], side, energy)
        result = matrix - inside if away else inside
        # Without a trace nothing was solved yet: a random start says nothing.
        cold = (bases[path].trace <= 0)[..., None, None, None]
        result = jnp.where(cold, matrix, result)
        return view.from_matrix(result, leaf.shape).astype(leaf.dtype)

    return map_paths(change, tree)
