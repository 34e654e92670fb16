"""Rotations of kernels: updates in the Lie algebra of SO(d_in) and SO(d_out).

Along `W ↦ exp(A) W` the gradient of the loss is `A = skew(GWᵀ)`. What of it touches
the layer's eigenspace V has rank 2k at the most (P = VVᵀ):

    PA + AP − PAP = VYᵀ − YVᵀ,   Y = −(I − ½P) A V,

a descent direction whatever V is, and the step `W ← exp(−η(VYᵀ − YVᵀ)) W` costs a few
products with 2k columns. It keeps every singular value of W. From the right, the same
holds for Wᵀ and Gᵀ. What changes the singular values is the symmetric part of GWᵀ, the
radial part, with `Z = (I − ½P) sym(GWᵀ) V`:

    W ← exp(−η(VYᵀ − YVᵀ)) W − ηκ (VZᵀ + ZVᵀ) W.

The eigenspace to follow is that of `AᵀA`, by default: near an optimum the gradient is
mostly radial, and its own eigenspace would miss what is left to turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import MatrixView, leaves_by_path, map_paths
from dsbp_jax.linalg import RETRACTIONS, Turn
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.tracking import (
    SIDES,
    SOURCES,
    Eigenspace,
    LayoutLike,
    Number,
    SpectralState,
    Step,
    Tracker,
    array_leaves,
    common_dtype,
    in_dtype,
    is_placeholder,
    tracked,
    wide,
)

_Parts = tuple[jax.Array, ...]


class LieState(NamedTuple):
    """State of `lie_rotation`.

    Attributes:
      spectral: The bases V.
      momentum: Side to path to the decaying sums of Y and Z, shape `(*batch, d, k)`
        each, float32; empty without momentum, Y alone without a radial part.
      master: A tree like the params with kernels of lower precision in float32, None
        elsewhere.
      plain: State of the optimizer of leaves that are no matrices.
    """

    spectral: SpectralState
    momentum: dict[str, dict[str, tuple[jax.Array, ...]]]
    master: optax.Params
    plain: optax.OptState


def lie_rotation(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    side: str = "both",
    retraction: str = "exp",
    momentum: Number = 0.0,
    radial: Number = 0.0,
    source: str = "rotation",
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: LayoutLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Rotates kernels along the gradient; their singular values stay as they are.

    A complete optimizer, the last of a chain: its updates contain the learning rate
    and the sign, and go to `optax.apply_updates` as they are. Leaves that are no
    matrices take plain steps at the same rate and momentum; with `optax.partition`
    another optimizer has them. A kernel of zeros has no direction to turn, and stays.

    Kernels of less than float32 could not keep their singular values. Their rotations
    are those of a float32 copy in the state, which the kernels follow up to one
    rounding; so nothing else may change them between two updates. Updates have the
    gradients' dtype, or the kernels' where that is wider.

    Args:
      learning_rate: η, a number or a schedule; the angle of a step is η‖A‖.
      rank: Columns k of each eigenbasis. A side of dimension `d ≤ k` is rotated by
        the whole of SO(d). A skew matrix turns planes, so bases that follow one have
        an even number of columns: an odd one is raised by one.
      side: `"input"` rotates kernels `(d_in, d_out)` from the left, `"output"` from
        the right, `"both"` from both.
      retraction: `"exp"`, or `"cayley"`, which agrees to second order.
      momentum: β of the sums `Y ← βY + Y_t` (and Z), which live in the algebra and
        follow the bases; 0 keeps none.
      radial: κ in [0, 1], the share of the radial part; 0 freezes singular values.
      source: What the bases follow: `"rotation"` (A itself), `"gradient"` or
        `"activation"` (then `update` takes `activations=`).
      refresh_every: Steps between two refreshes of a leaf; the leaves take turns.
      num_blocks: Krylov blocks of a refresh, at least 2.
      tolerance: While a basis is invariant to this relative residual, in [0, 1], only
        rotate it inside its span.
      layout: Matrix views from `dsbp_jax.layout`; None goes by the shapes.
      seed: Of the bases' random start.

    Returns:
      A transformation; `update` needs params. `dsbp_jax.bases` finds the bases in its
      state.

    Raises:
      ValueError: An argument is out of its range; in `update`, params or activations
        are missing.

    References:
      [P] Edelman, Arias and Smith, The geometry of algorithms with orthogonality
      constraints, 1998, for the gradient; the low-rank form is this project's [O].
      METHODS section 5.

    Example:
      >>> import dsbp_jax
      >>> tx = dsbp_jax.lie_rotation(0.1, rank=2)
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> grads = {"kernel": jnp.ones((3, 3))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> kernel = optax.apply_updates(params, updates)["kernel"]
      >>> print(jnp.linalg.svd(kernel, compute_uv=False).round(4))
      [3. 2. 1.]
    """
    checks.one_of("side", side, (*SIDES, "both"))
    rank = checks.positive_int("rank", rank)
    tracker = Tracker(
        rank=rank + rank % 2 if source == "rotation" else rank,
        source=source,
        side=side,
        refresh_every=refresh_every,
        num_blocks=num_blocks,
        tolerance=tolerance,
        layout=layout,
        seed=seed,
        sources=SOURCES,
        needs_all=True,
    )
    plain = optax.sgd(
        learning_rate, None if checks.is_static(momentum, 0) else momentum
    )
    return rotated_descent(
        learning_rate,
        plain,
        tracker,
        retraction=retraction,
        momentum=momentum,
        radial=radial,
    )


def rotated_descent(
    learning_rate: optax.ScalarOrSchedule,
    plain: optax.GradientTransformation,
    tracker: Tracker,
    *,
    retraction: str,
    momentum: Number,
    radial: Number,
) -> optax.GradientTransformationExtraArgs:
    """Rotations of the kernels, and any optimizer for the other leaves.

    Args:
      learning_rate: η, a number or a schedule.
      plain: The optimizer of leaves that are no matrices.
      tracker: What is tracked.
      retraction: `"exp"` or `"cayley"`.
      momentum: β.
      radial: κ in [0, 1].

    Returns:
      A transformation with a `LieState`.
    """
    if not callable(learning_rate):
        checks.non_negative("learning_rate", learning_rate)
    checks.one_of("retraction", retraction, RETRACTIONS)
    checks.in_unit_interval("momentum", momentum)
    checks.in_unit_interval("radial", radial)
    sides = SIDES if tracker.side == "both" else (tracker.side,)
    carries = not checks.is_static(momentum, 0)
    stretches = not checks.is_static(radial, 0)

    def begin(params: optax.Params, spectral: SpectralState) -> LieState:
        if is_placeholder(params):
            leaf: Any = jnp.zeros(())
            return LieState(spectral, leaf, params, plain.init(params))
        views, leaves = tracker.views(params), array_leaves(params)
        averages: dict[str, dict[str, _Parts]] = {}
        for one in sides if carries else ():
            averages[one] = {}
            for path, view in views.items():
                shape = view.matrix_shape(leaves[path].shape)
                dim = shape[-2 + SIDES.index(one)]
                zeros = jnp.zeros(
                    (*shape[:-3], dim, min(tracker.rank, dim)), jnp.float32
                )
                averages[one][path] = tuple(
                    vary(jnp.copy(zeros), varying_axes(leaves[path]))
                    for _ in range(1 + stretches)
                )
        low = [path for path in views if leaves[path].dtype.itemsize < 4]
        widen = lambda path, leaf: leaf.astype(jnp.float32) if path in low else None
        master = map_paths(widen, params)
        return LieState(spectral, averages, master, plain.init(_without(params, views)))

    def use(step: Step) -> tuple[optax.Updates, LieState]:
        state, params = step.state, step.params
        views = tracker.views(params)
        rate = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.spectral.count)
        rate = jnp.asarray(rate).astype(jnp.float32)
        averages = {one: dict(held) for one, held in state.momentum.items()}
        master, kernels = leaves_by_path(state.master), leaves_by_path(params)
        rest, plain_state = plain.update(
            _without(step.updates, views), state.plain, _without(params, views)
        )
        moved, before = leaves_by_path(rest), state.spectral.spaces()

        def move(path: str, gradient: jax.Array) -> jax.Array:
            if path not in views:
                return moved[path]
            held = kernels[path]
            dtype = wide(held.dtype)
            view, kernel = views[path], master.get(path, held).astype(dtype)
            w = view.to_matrix(kernel)
            g = view.to_matrix(gradient).astype(dtype)
            turned, stretched = w, jnp.zeros_like(w)
            step_size = rate.astype(dtype)
            for one in sides:
                space = _on_side(step.spaces.get(path, ()), one)
                turn, flat, stack = _turn(one, space, w)
                parts: _Parts = turn.elements(flat(w), flat(g))[: 1 + stretches]
                if carries:
                    old = _on_side(before.get(path, ()), one)
                    old_parts = turn.transported(
                        tuple(part.astype(dtype) for part in averages[one][path]),
                        None if old is None else old.vectors.astype(dtype),
                    )
                    parts = tuple(
                        in_dtype(momentum, dtype) * average + part
                        for average, part in zip(old_parts, parts, strict=True)
                    )
                    averages[one][path] = tuple(
                        part.astype(jnp.float32) for part in parts
                    )
                rotated = turn.rotate(flat(turned), -step_size * parts[0], retraction)
                turned = stack(rotated)
                if stretches:
                    stretched += stack(turn.stretch(flat(w), parts[1]))
            if stretches:
                turned -= step_size * in_dtype(radial, dtype) * stretched
            new = view.from_matrix(turned, kernel.shape)
            if path in master:
                master[path] = new
            # Narrower gradients must not round the steps of wider kernels.
            widest = common_dtype(gradient.dtype, held.dtype)
            return (new - held.astype(dtype)).astype(widest)

        with jax.default_matmul_precision("highest"):
            moves = map_paths(move, step.updates)
        masters = map_paths(lambda path, _: master[path], state.master)
        return moves, LieState(step.spectral, averages, masters, plain_state)

    return tracked(tracker, use, begin=begin, needs_params="lie_rotation")


def _on_side(spaces: Sequence[Eigenspace], side: str) -> Eigenspace | None:
    return next((space for space in spaces if space.side == side), None)


def _turn(
    side: str, space: Eigenspace | None, matrix: jax.Array
) -> tuple[Turn, Any, Any]:
    """The algebra of one side, and how matrices are laid out flat for it and back.

    Window taps share a rotation: they are among the other dimension.
    """
    *batch, window, d_in, d_out = shape = matrix.shape
    # A side that is not tracked is rotated whole: V = I.
    if space is None:
        basis = jnp.eye(shape[-2 + SIDES.index(side)], dtype=matrix.dtype)
    else:
        basis = space.vectors.astype(matrix.dtype)
    turn = Turn(basis, left=side == "input")
    if side == "output":
        flat = lambda stack: stack.reshape(*batch, window * d_in, d_out)
        return turn, flat, lambda flat: flat.reshape(shape)

    def to_flat(stack: jax.Array) -> jax.Array:
        return jnp.moveaxis(stack, -3, -2).reshape(*batch, d_in, window * d_out)

    def to_stack(flat: jax.Array) -> jax.Array:
        return jnp.moveaxis(flat.reshape(*batch, d_in, window, d_out), -2, -3)

    return turn, to_flat, to_stack


def _without(tree: Any, views: Mapping[str, MatrixView]) -> Any:
    """A tree with holes where the leaves are rotated."""
    return map_paths(lambda path, leaf: None if path in views else leaf, tree)
