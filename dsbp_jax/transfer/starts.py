"""Where adapters start: columns of each layer's input side, and how many of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax import linalg
from dsbp_jax.layers import LayerActivations, Layout, MatrixView, Trace, capture_traced
from dsbp_jax.tracking import Eigenspace, activation_bases

#: Which directions of a layer's inputs an adapter begins with.
STARTS = ("explained", "null", "random")


def random_columns(
    shapes: Mapping[str, Sequence[int]], ranks: Mapping[str, int], key: jax.Array
) -> dict[str, jax.Array]:
    """Orthonormal columns that follow nothing.

    Args:
      shapes: Path to the matrix shape `(*batch, window, d_in, d_out)`.
      ranks: Path to columns.
      key: Of the draw.

    Returns:
      Path to columns `(*batch, d_in, rank)`.
    """
    found = {}
    for path, own in zip(ranks, jax.random.split(key, len(ranks)), strict=True):
        *batch, _, d_in, _ = shapes[path]
        keys = jax.random.split(own, tuple(batch))
        draw = lambda key, d=d_in, k=ranks[path]: linalg.init_basis(d, k, key=key)
        for _ in batch:
            draw = jax.vmap(draw)
        found[path] = draw(keys).vectors
    return found


def explained_columns(
    traced: Trace,
    arrays: Sequence[Any],
    layout: Layout,
    spaces: Mapping[str, Eigenspace],
    ranks: Mapping[str, int],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The directions that explain most of what the layers see, by an exact pass.

    Args:
      traced: The model function.
      arrays: The array leaves of `(params, args, kwargs)`.
      layout: The views of the leaves with adapters.
      spaces: Input-side eigenspaces to stay outside of, by path; a leaf without one is
        free.
      ranks: Path to columns.

    Returns:
      Path to columns `(*batch, d_in, rank)`, and path to the share of the variance that
      each holds, `(rank,)`, its mean over a stack.
    """
    of = {site.name: site.path for site in traced.sites if site.path in layout}

    @jax.jit
    def solve(arrays: Sequence[Any], spaces: Mapping[str, Eigenspace]) -> Any:
        _, seen = capture_traced(traced, arrays, sides=("inputs",))
        seen = {name: seen[name] for name in of}
        kept = {
            name: _outside(layer, spaces[of[name]])
            if of[name] in spaces and layer.view == layout[of[name]]
            else layer
            for name, layer in seen.items()
        }
        # Of all that a layer sees only the trace is used: no solve is compiled.
        whole = activation_bases(seen, 1)
        columns, shares = {}, {}
        for path, rank in ranks.items():
            found = activation_bases(_uses(kept, of, path), rank)[path]
            columns[path] = found.vectors
            if path in spaces:
                # Without variance left, eigenvectors point anywhere.
                columns[path] = _clean(spaces[path], found.vectors)
            total = jnp.maximum(whole[path].trace, jnp.finfo(jnp.float32).tiny)
            share = found.values / total[..., None]
            shares[path] = share.reshape(-1, share.shape[-1]).mean(axis=0)
        return columns, shares

    return solve(arrays, spaces)


def share_out(
    shares: Mapping[str, np.ndarray], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks by what a column explains for each number that it costs.

    Args:
      shares: Path to the share that each column explains, falling.
      costs: Path to trainable numbers of a column.
      budget: Trainable numbers in all.

    Returns:
      Path to rank, of those that got any.

    Raises:
      ValueError: The budget is too small for any column.

    Example:
      >>> shares = {"a": np.array([0.9, 0.1]), "b": np.array([0.5, 0.4])}
      >>> share_out(shares, {"a": 10, "b": 10}, 30)
      {'a': 1, 'b': 2}
    """
    offers = [
        (share / costs[path], path)
        for path, own in shares.items()
        for share in np.minimum.accumulate(own)
        if share > 0
    ]
    ranks: dict[str, int] = {}
    full: set[str] = set()
    for _, path in sorted(offers, key=lambda offer: -offer[0]):
        if path not in full and costs[path] <= budget:
            ranks[path] = ranks.get(path, 0) + 1
            budget -= costs[path]
        else:
            full.add(path)
    if not ranks:
        raise ValueError(
            f"budget must be at least {min(costs.values())}, the trainable numbers of "
            f"the smallest adapter of rank 1, got {budget}"
        )
    return {path: ranks[path] for path in shares if path in ranks}


def _uses(
    seen: Mapping[str, LayerActivations], of: Mapping[str, str], path: str
) -> dict[str, LayerActivations]:
    """What all uses of one leaf saw."""
    return {name: layer for name, layer in seen.items() if of[name] == path}


def _outside(layer: LayerActivations, space: Eigenspace) -> LayerActivations:
    """`X(I − P)`."""
    rows, _ = layer.rows("input")
    *batch, _, _ = range(rows.ndim)
    view = MatrixView((rows.ndim - 1,), (rows.ndim - 2,), tuple(batch))
    apart = dataclasses.replace(space, view=view).outside(rows.astype(jnp.float32))
    return layer._replace(inputs=apart)


def _clean(space: Eigenspace, vectors: jax.Array) -> jax.Array:
    """An orthonormal basis of the same, orthogonal to a space in any case."""
    *batch, _, _ = range(vectors.ndim)
    view = MatrixView((vectors.ndim - 2,), (vectors.ndim - 1,), tuple(batch))
    left = dataclasses.replace(space, view=view).outside(vectors)
    extend = linalg.extend_basis
    for _ in batch:
        extend = jax.vmap(extend)
    return extend(space.vectors, left)
