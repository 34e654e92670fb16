"""Spectral projection: gradients on the leading eigenspace of their layer.

For a kernel seen as a matrix W of shape `(d_in, d_out)` with gradient G and an
orthonormal eigenbasis V of its input or output covariance, the update becomes

    G − (1 − κ)(G − PG),   PG = VVᵀG (input side) or GVVᵀ (output side),

with `residual` κ in [0, 1]: 0 projects, 1 changes nothing.
"""

import optax

from dsbp_jax import checks
from dsbp_jax.layers import map_paths
from dsbp_jax.tracking import (
    SIDES,
    LayoutLike,
    Number,
    Step,
    Tracker,
    project,
    tracked,
)


def spectral_projection(
    rank: int,
    *,
    source: str = "gradient",
    side: str = "output",
    residual: Number = 0.0,
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    energy: Number | None = None,
    layout: LayoutLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Projects every kernel's gradient on a tracked eigenspace of its layer.

    Put it before momentum or any other optimizer in `optax.chain`. An elementwise
    optimizer after it (Adam) leaves the subspace again.

    Args:
      rank: Columns k of each eigenbasis. Where k reaches the layer's dimension the
        projection is the identity, and nothing is tracked.
      source: `"gradient"` follows the gradient's own covariance and needs nothing
        else; `"activation"` follows the layer's activations, which `update` then
        takes as `activations=` (see `dsbp_jax.capture_activations`).
      side: `"output"` projects the layer's response (the paper's choice),
        `"input"` its input, `"both"` both.
      residual: κ, the share of the complement that is kept. A static 1 skips
        everything: the updates are the gradients, bit for bit.
      refresh_every: Steps between two refreshes of a leaf; the leaves take turns.
      num_blocks: Krylov blocks of a refresh, at least 2.
      tolerance: While a basis is invariant to this relative residual, in [0, 1], only
        rotate it inside its span.
      energy: Use only the leading columns that hold this share of the trace (the
        paper's p), at most k. None uses all k.
      layout: Matrix views from `dsbp_jax.layout`, or a function from params (from
        updates, where `update` gets no params) to them; leaves it does not name
        keep their gradient. None goes by the shapes: 2-D is `(in, out)`, 4-D
        `(height, width, in, out)`, others have the matrix last.
      seed: Of the bases' random start.

    Returns:
      A transformation whose state is a `SpectralState`. `update` also takes
      `refresh=True` or `False` (static) to overrule the schedule.

    Raises:
      ValueError: An argument is out of its range; in `update`, activations are
        missing or do not fit.

    References:
      [P] Muthuraman, Dynamic spectral backpropagation, arXiv 2505.23369, 2025, for
      κ = 0 on the output side with activations; the rest is this project's design [O].
      METHODS section 1.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_jax
      >>> tx = optax.chain(dsbp_jax.spectral_projection(rank=1), optax.sgd(0.1))
      >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
      >>> grads = {"kernel": jnp.diag(jnp.array([2.0, 1.0, 0.0]))[:, :2],
      ...          "bias": jnp.ones(2)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"].tolist()
      [[-0.200, -0.000], [-0.000, -0.000], [-0.000, -0.000]]
    """
    checks.one_of("side", side, (*SIDES, "both"))
    checks.in_unit_interval("residual", residual)
    if energy is not None:
        checks.in_unit_interval("energy", energy, open_left=True)
    tracker = Tracker(
        rank=rank,
        source=source,
        side=side,
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
        inert=checks.is_static(residual, 1),
    )
    return tracked(
        tracker, lambda step: (project_step(step, residual, energy), step.spectral)
    )


def project_step(
    step: Step, residual: Number = 0.0, energy: Number | None = None
) -> optax.Updates:
    """The updates of a step, projected on its eigenspaces."""
    return map_paths(
        lambda path, leaf: project(leaf, step.spaces.get(path, ()), residual, energy),
        step.updates,
    )
