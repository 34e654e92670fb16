"""Spectral decay: shrink a kernel along the sharpest directions of its layer.

The paper's flatness term `β λ₁ e₁e₁ᵀ` has the shape of the kernel only in square
layers. What is used here is the gradient of `½β Σᵢ λᵢ‖Weᵢ‖²`, which is that term
applied to W and has the shape of W always.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import (
    Layout,
    MatrixView,
    leaves_by_path,
    map_paths,
)
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import SIDES, SpectralState, Tracker, check_bases


def add_spectral_decay(
    strength: float | jax.Array,
    *,
    source: str = "activation",
    side: str = "output",
    bases: Mapping[str, EigenBasis] | None = None,
    rank: int = 1,
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: Layout | Callable[[Any], Layout] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adds `β Σᵢ λᵢ W eᵢeᵢᵀ` (input side: `β Σᵢ λᵢ eᵢeᵢᵀ W`) to the updates.

    Like `optax.add_decayed_weights` it belongs before the learning rate's scaling.
    A step shrinks W along eᵢ by the factor `1 − ηβλᵢ`: keep `ηβλ₁` under 1.

    Args:
      strength: β, at least 0.
      source: `"activation"` (then `update` takes `activations=`) or `"gradient"`.
      side: `"output"` or `"input"`.
      bases: Fixed eigenbases by canonical path; with them nothing is tracked, and
        leaves without one are left alone. They may also come with each update, as
        `update(..., bases=...)`, which goes first.
      rank: Number of leading directions; the paper's term has 1.
      refresh_every: As `dsbp_jax.spectral_projection`; so are those below.
      num_blocks: See there.
      tolerance: See there.
      layout: See there.
      seed: See there.

    Returns:
      A transformation whose state is a `SpectralState`; `update` needs `params`.

    Raises:
      ValueError: An argument is out of its range; in `update`, params or
        activations are missing, or `bases` do not fit the params.

    References:
      Muthuraman, Dynamic spectral backpropagation, arXiv 2505.23369, 2025.

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
    checks.one_of("side", side, SIDES)
    tracker = Tracker(
        rank=rank,
        source=source,
        side=side,
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
        cap_rank=True,
    )

    def init_fn(params: Any) -> SpectralState:
        if bases is not None:
            return SpectralState(jnp.zeros((), jnp.int32), {})
        return tracker.init(params)

    @keep_shardings
    def update_fn(
        updates: Any,
        state: SpectralState,
        params: Any = None,
        *,
        activations: Any = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SpectralState]:
        if params is None:
            raise ValueError(
                "add_spectral_decay needs params: call update(grads, state, params)"
            )
        views = tracker.views(params)
        given = extra_args.get("bases", bases)
        if given is None:
            state = tracker.update(
                state, updates, views, activations=activations, refresh=refresh
            )
            given = {path: e.basis for path, e in state.tracked.get(side, {}).items()}
        else:
            state = SpectralState(optax.safe_increment(state.count), state.tracked)
            check_bases("bases", given, params, views, side, rank)
        return add_decay(updates, params, given, views, strength, side, rank), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_decay(
    updates: Any,
    params: Any,
    bases: Mapping[str, EigenBasis],
    views: Mapping[str, MatrixView],
    strength: float | jax.Array,
    side: str,
    rank: int | None = 1,
) -> Any:
    """Adds `β Σᵢ λᵢ W eᵢeᵢᵀ` over the leading `rank` directions.

    Args:
      updates: A tree that may lack leaves of the params (None).
      params: The kernels W.
      bases: By canonical path; leaves without one are left alone.
      views: The matrix views of the leaves.
      strength: β.
      side: `"input"` or `"output"`.
      rank: Number of directions, at most the columns of each basis; None is all.

    Returns:
      The new updates, dtypes kept.
    """
    kernels = leaves_by_path(params)

    def add_to_leaf(path: str, update: jax.Array) -> jax.Array:
        if path not in bases or path not in views:
            return update
        # The taps of a window share the basis.
        e = bases[path].vectors[..., None, :, :rank]
        values = bases[path].values[..., None, None, :rank]
        matrix = views[path].to_matrix(kernels[path]).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            if side == "output":
                term = ((matrix @ e) * values) @ jnp.swapaxes(e, -1, -2)
            else:
                term = (e * values) @ (jnp.swapaxes(e, -1, -2) @ matrix)
        term = views[path].from_matrix(term, update.shape)
        return (update.astype(jnp.float32) + strength * term).astype(update.dtype)

    return map_paths(add_to_leaf, updates)
