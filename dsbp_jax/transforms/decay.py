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

from dsbp_jax.layers import Layout, canonical_path
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.transforms import checks
from dsbp_jax.transforms.sharding import keep_shardings
from dsbp_jax.transforms.tracking import SIDES, SpectralState, Tracker


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
        leaves without one are left alone. They also come with each update, as
        `update(..., bases=...)`.
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
        activations are missing.

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
        given = extra_args.get("bases", bases)
        if given is None:
            state = tracker.update(
                state, updates, activations=activations, refresh=refresh
            )
            given = {path: e.basis for path, e in state.tracked.get(side, {}).items()}
        else:
            state = SpectralState(optax.safe_increment(state.count), state.tracked)
        term = decay_term(params, given, tracker, side, rank)
        return jax.tree.map(
            lambda u, t: (u + strength * t).astype(u.dtype), updates, term
        ), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decay_term(
    params: Any,
    bases: Mapping[str, EigenBasis],
    tracker: Tracker,
    side: str,
    rank: int = 1,
) -> Any:
    """`Σᵢ λᵢ W eᵢeᵢᵀ` over the leading `rank` directions, 0 where there is no basis.

    Args:
      params: The kernels W.
      bases: By canonical path.
      tracker: Names the matrix views.
      side: `"input"` or `"output"`.
      rank: Number of directions.

    Returns:
      A tree like `params`, float32 where there is a basis.
    """
    views = tracker.views(params)

    def leaf_term(key_path: Any, leaf: jax.Array) -> jax.Array:
        path = canonical_path(key_path)
        view = views.get(path)
        if path not in bases or view is None:
            return jnp.zeros_like(leaf)
        # The taps of a window share the basis.
        e = bases[path].vectors[..., None, :, :rank]
        values = bases[path].values[..., None, None, :rank]
        matrix = view.to_matrix(leaf).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            if side == "output":
                term = ((matrix @ e) * values) @ jnp.swapaxes(e, -1, -2)
            else:
                inside = jnp.swapaxes(e, -1, -2) @ matrix
                term = (e * values) @ inside
        return view.from_matrix(term, leaf.shape)

    return jax.tree.map_with_path(leaf_term, params)
