"""Spectral decay: shrink a kernel along the sharpest directions of its layer.

The paper's flatness term `β λ₁ e₁e₁ᵀ` has the shape of the kernel only in square
layers. What is used here is the gradient of `½β Σᵢ λᵢ‖Weᵢ‖²`, which is that term
applied to W and has the shape of W always.
"""

from collections.abc import Mapping

import jax
import optax

from dsbp_jax import checks
from dsbp_jax.layers import map_paths
from dsbp_jax.tracking import (
    SIDES,
    Eigenspace,
    LayoutLike,
    Number,
    Spaces,
    SpectralState,
    Step,
    Tracker,
    array_leaves,
    in_dtype,
    labelled,
    require_some,
    tracked,
    wide,
)


def add_spectral_decay(
    strength: Number,
    *,
    source: str = "activation",
    side: str | None = None,
    bases: Spaces | None = None,
    rank: int = 1,
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: LayoutLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adds `β Σᵢ λᵢ W eᵢeᵢᵀ` (input side: `β Σᵢ λᵢ eᵢeᵢᵀ W`) to the updates.

    Like `optax.add_decayed_weights` it belongs before the learning rate's scaling.
    A step shrinks W along eᵢ by the factor `1 − ηβλᵢ`: keep `ηβλ₁` under 1.

    Args:
      strength: β, at least 0.
      source: `"activation"` (then `update` takes `activations=`) or `"gradient"`.
      side: `"output"` or `"input"`. None tracks the output side, and of bases that are
        given takes the side that they are of.
      bases: Fixed eigenspaces by canonical path, as `dsbp_jax.eigenspaces` gives them;
        with them nothing is tracked, and leaves without one are left alone. They may
        also come with each update, as `update(..., bases=...)`, which goes first.
      rank: Number of leading directions; the paper's term has 1.
      refresh_every: Steps between two refreshes of a leaf; the leaves take turns.
      num_blocks: Krylov blocks of a refresh, at least 2.
      tolerance: While a basis is invariant to this relative residual, in [0, 1], only
        rotate it inside its span.
      layout: Matrix views from `dsbp_jax.layout`; None goes by the shapes.
      seed: Of the bases' random start.

    Returns:
      A transformation whose state is a `SpectralState`; `update` needs `params`.

    Raises:
      ValueError: An argument is out of its range; in `update`, params or
        activations are missing, or `bases` do not fit the params.

    References:
      [P] Muthuraman, Dynamic spectral backpropagation, arXiv 2505.23369, 2025.
      METHODS section 1.

    Example:
      >>> import jax.numpy as jnp, dsbp_jax
      >>> from dsbp_jax.linalg import EigenBasis
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> tx = dsbp_jax.add_spectral_decay(0.1, bases={"kernel": basis})
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> grads = {"kernel": jnp.zeros((3, 2))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"][0])
      [0.4 0. ]
    """
    checks.non_negative("strength", strength)
    if bases is not None:
        require_some("bases", bases)
    if side is not None:
        checks.one_of("side", side, SIDES)
    tracker = Tracker(
        rank=rank,
        source=source,
        side=side or "output",
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
        cap_rank=True,
        inert=bases is not None,
    )

    def decay(step: Step) -> tuple[optax.Updates, SpectralState]:
        given, spaces = step.extra.get("bases"), step.spaces
        if given is None:
            given = bases
        if given is not None:
            spaces = labelled("bases", given, step.params, layout, side=side, rank=rank)
        leading = {
            path: found[0].leading(rank) for path, found in spaces.items() if found
        }
        return add_decay(step.updates, step.params, leading, strength), step.spectral

    return tracked(tracker, decay, needs_params="add_spectral_decay", takes_bases=True)


def add_decay(
    updates: optax.Updates,
    params: optax.Params,
    spaces: Mapping[str, Eigenspace],
    strength: Number,
) -> optax.Updates:
    """Adds `β Σᵢ λᵢ W eᵢeᵢᵀ` over all directions of each eigenspace.

    Args:
      updates: A tree that may lack leaves of the params (None).
      params: The kernels W.
      spaces: By canonical path; leaves without one are left alone.
      strength: β.

    Returns:
      The new updates, dtypes kept.
    """
    kernels = array_leaves(params)

    def add_to_leaf(path: str, update: jax.Array) -> jax.Array:
        if path not in spaces:
            return update
        term = spaces[path].weighted(kernels[path])
        dtype = wide(term.dtype, update.dtype)
        decayed = update.astype(dtype) + in_dtype(strength, dtype) * term.astype(dtype)
        return decayed.astype(update.dtype)

    return map_paths(add_to_leaf, updates)
