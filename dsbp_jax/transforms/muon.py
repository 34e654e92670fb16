"""The ready optimizer: whitened momentum for hidden matrices, AdamW for the rest."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import Roles, map_paths, require_paths
from dsbp_jax.tracking import (
    LayoutLike,
    Number,
    array_leaves,
    check_layout,
    common_dtype,
    matrix_views,
)
from dsbp_jax.transforms.whitening import Sizes, spectral_whitening

#: Which leaves are whitened: roles by path, paths, or a function of path and leaf.
Hidden = Mapping[str, str] | Collection[str] | Callable[[str, jax.Array], bool] | None

#: The roles of leaves that are whitened.
WHITENED = ("hidden", "first")


def spectral_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 64,
    *,
    momentum: Number = 0.95,
    nesterov: bool = True,
    weight_decay: Number = 0.0,
    power: Number = 0.5,
    residual: Number = 1.0,
    damping: Number = 0.0,
    scale: str | None = "rms",
    refresh_every: int | None = 1,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    betas: tuple[Number, Number] = (0.9, 0.95),
    hidden: Hidden = None,
    layout: LayoutLike = None,
    sizes: Sizes | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon's step for the price of three thin products; AdamW for what is no matrix.

    The momentum of hidden matrices is divided by the root of its own spectrum
    (`spectral_whitening`): the k leading singular values one by one, all others by
    their mean. Embeddings, heads, biases and norms go to AdamW. With `scale="rms"`
    both parts make steps of Adam's size, and one learning rate serves all leaves.

    Args:
      learning_rate: A number or a schedule.
      rank: Columns k of each basis. Muon's own update where it reaches the smaller
        side of a matrix. 16 makes steps cheaper and a little worse, and took less
        time to the same loss where it was measured (experiments/results).
      momentum: Of `optax.trace`, kept in float32 at least.
      nesterov: Whether the momentum looks ahead.
      weight_decay: Decoupled, times the learning rate; of matrices only. What is faster
        overfits sooner, so tune it: the more often data are seen, the more of it was
        best (experiments/results).
      power: As for `spectral_whitening`. Worth tuning: more than ½ turns the order of
        singular values round.
      residual: As for `spectral_whitening`.
      damping: Likewise.
      scale: Likewise. Of an MLP the best rate was the same at widths 256 and 1024 with
        "rms", and a third at the greater with "spectral".
      refresh_every: Likewise. 4 saves one of three products in most steps, and trains
        much worse: what is newest in the momentum is then outside of the basis, and
        scaled up with the tail.
      adam_learning_rate: Of all other leaves; by default the same.
      betas: Of AdamW.
      hidden: What is whitened: `dsbp_jax.roles(fn, params, *args)` (those that are
        hidden or first), paths, or a function of path and leaf. None takes every
        matrix that the layout names, as `optax.contrib.muon` does: embeddings and heads
        too.
      layout: Matrix views from `dsbp_jax.layout`. None takes those of the roles.
        Without roles it goes by the shapes, which takes an attention kernel
        `(d, heads, head_dim)` for d small matrices.
      sizes: As for `spectral_whitening`, where it runs on coordinates.
      seed: Of the bases' random start.

    Returns:
      A transformation whose updates are to be added to the params; `update` needs
      params where weights decay.

    Raises:
      ValueError: An argument is out of its range, or `hidden` names no leaf.

    References:
      [P] Jordan et al., Muon, 2024; Huang et al., Spectra, arXiv 2602.11185, for the
      low rank with its tail. METHODS section 8.

    Example:
      >>> import jax, jax.numpy as jnp, optax, dsbp_jax
      >>> tx = dsbp_jax.spectral_muon(0.1, rank=2, hidden=["kernel"])
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> grads = {"kernel": jnp.eye(4, 3), "bias": jnp.ones(3)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"][0].round(2), updates["bias"].round(2))
      [-0.04  0.    0.  ] [-0.1 -0.1 -0.1]
    """
    checks.in_unit_interval("momentum", momentum)
    checks.non_negative("weight_decay", weight_decay)
    check_layout(layout)
    if layout is None and isinstance(hidden, Roles):
        if sizes:
            raise ValueError(
                "layout must be that of the coordinates with sizes, got None: the "
                "roles have that of the kernels"
            )
        layout = hidden.layout
    whitening = spectral_whitening(
        rank,
        power=power,
        residual=residual,
        damping=damping,
        scale=scale,
        refresh_every=refresh_every,
        layout=layout,
        sizes=sizes,
        seed=seed,
    )
    decay = []
    if not checks.is_static(weight_decay, 0):
        decay = [optax.add_decayed_weights(weight_decay, mask=_matrices)]
    whitened = optax.chain(
        _momentum(momentum, nesterov),
        whitening,
        *decay,
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        *betas,
        weight_decay=weight_decay,
        mask=_matrices,
    )
    labels = lambda params: labels_of(params, hidden, layout)
    parts = optax.partition({"whitened": whitened, "adamw": adam}, labels)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        new, state = parts.update(updates, state, params, **extra)
        # Momentum is wider than the gradients of narrow params.
        same = lambda leaf, old: (
            leaf.astype(old.dtype) if hasattr(old, "dtype") else leaf
        )
        return jax.tree.map(same, new, updates), state

    return optax.GradientTransformationExtraArgs(parts.init, update_fn)


def labels_of(params: optax.Params, hidden: Hidden, layout: LayoutLike) -> Any:
    """`"whitened"` or `"adamw"` for each leaf."""
    leaves = array_leaves(params)
    views = matrix_views(params, layout)
    if hidden is None:
        chosen = lambda path, leaf: True
    elif callable(hidden):
        chosen = hidden
    else:
        named = list(hidden)
        if isinstance(hidden, Mapping):
            named = [path for path, role in hidden.items() if role in WHITENED]
        if leaves and not any(path in leaves for path in named):
            require_paths(named[:1], leaves, "params")
        chosen = lambda path, leaf: path in named
    of = lambda path, leaf: path in views and bool(chosen(path, leaf))
    return map_paths(
        lambda path, leaf: "whitened" if of(path, leaf) else "adamw", params
    )


def _matrices(params: optax.Params) -> Any:
    """What decays: whatever has two axes or more."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _momentum(decay: Number, nesterov: bool) -> optax.GradientTransformationExtraArgs:
    """`optax.trace`, in float32 for gradients that are narrower."""
    trace = optax.trace(decay, nesterov)
    wide = lambda leaf: leaf.astype(common_dtype(leaf.dtype, jnp.float32))
    widened = lambda tree: jax.tree.map(wide, tree)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        return trace.update(widened(updates), state, params)

    return optax.GradientTransformationExtraArgs(
        lambda params: trace.init(widened(params)), update_fn
    )
