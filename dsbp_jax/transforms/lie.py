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

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks, linalg
from dsbp_jax.layers import Layout, MatrixView, leaves_by_path, map_paths
from dsbp_jax.linalg import RETRACTIONS, left_product, rotation_change
from dsbp_jax.meshes import keep_shardings
from dsbp_jax.tracking import (
    SIDES,
    SOURCES,
    SpectralState,
    TrackedBasis,
    Tracker,
)


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
    master: Any
    plain: optax.OptState


def lie_rotation(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    side: str = "both",
    retraction: str = "exp",
    momentum: float | jax.Array = 0.0,
    radial: float | jax.Array = 0.0,
    source: str = "rotation",
    refresh_every: int = 10,
    num_blocks: int = 2,
    tolerance: float = 0.0,
    layout: Layout | Callable[[Any], Layout] | None = None,
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
      refresh_every: As `dsbp_jax.spectral_projection`; so are those below.
      num_blocks: See there.
      tolerance: See there.
      layout: See there.
      seed: See there.

    Returns:
      A transformation; `update` needs params. `dsbp_jax.bases` finds the bases in its
      state.

    Raises:
      ValueError: An argument is out of its range; in `update`, params or activations
        are missing.

    References:
      Edelman, Arias and Smith, The geometry of algorithms with orthogonality
      constraints, 1998, for the gradient; the low-rank form is this project's design.

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
    if not callable(learning_rate):
        checks.non_negative("learning_rate", learning_rate)
    checks.one_of("side", side, (*SIDES, "both"))
    checks.one_of("retraction", retraction, RETRACTIONS)
    checks.in_unit_interval("momentum", momentum)
    checks.in_unit_interval("radial", radial)
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
    )
    sides = SIDES if side == "both" else (side,)
    carries = not checks.is_static(momentum, 0)
    stretches = not checks.is_static(radial, 0)
    plain = optax.sgd(learning_rate, momentum if carries else None)

    def init_fn(params: Any) -> LieState:
        spectral = tracker.init(params)
        if not isinstance(spectral.tracked, dict):  # a placeholder
            leaf: Any = jnp.zeros(())
            return LieState(spectral, leaf, params, plain.init(params))
        views, leaves = tracker.views(params), leaves_by_path(params)
        averages: dict[str, dict[str, tuple[jax.Array, ...]]] = {}
        for one in sides if carries else ():
            averages[one] = {}
            for path, view in views.items():
                shape = view.matrix_shape(leaves[path].shape)
                dim = shape[-2 + SIDES.index(one)]
                shape = (*shape[:-3], dim, min(tracker.rank, dim))
                averages[one][path] = tuple(
                    jnp.zeros(shape, jnp.float32) for _ in range(1 + stretches)
                )
        low = [path for path in views if leaves[path].dtype.itemsize < 4]
        widen = lambda path, leaf: leaf.astype(jnp.float32) if path in low else None
        master = map_paths(widen, params)
        return LieState(spectral, averages, master, plain.init(_without(params, views)))

    @keep_shardings
    def update_fn(
        updates: Any,
        state: LieState,
        params: Any = None,
        *,
        activations: Any = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LieState]:
        del extra_args
        if params is None:
            raise ValueError(
                "lie_rotation needs params: call update(grads, state, params)"
            )
        views = tracker.views(params)
        spectral = tracker.update(
            state.spectral,
            updates,
            views,
            activations=activations,
            params=params,
            refresh=refresh,
        )
        rate = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.spectral.count)
        rate = jnp.asarray(rate, jnp.float32)
        averages = {one: dict(held) for one, held in state.momentum.items()}
        master, kernels = leaves_by_path(state.master), leaves_by_path(params)
        rest, plain_state = plain.update(
            _without(updates, views), state.plain, _without(params, views)
        )
        moved = leaves_by_path(rest)

        def move(path: str, gradient: jax.Array) -> jax.Array:
            if path not in views:
                return moved[path]
            held = kernels[path]
            view, kernel = views[path], master.get(path, held).astype(jnp.float32)
            w = view.to_matrix(kernel)
            g = view.to_matrix(gradient).astype(jnp.float32)
            turned, stretched = w, jnp.zeros_like(w)
            for one in sides:
                turn = _Turn(one, spectral.tracked.get(one, {}).get(path), w.shape)
                parts = turn.elements(w, g)[: 1 + stretches]
                if carries:
                    old = state.spectral.tracked.get(one, {}).get(path)
                    held_parts = turn.transported(averages[one][path], old)
                    parts = tuple(
                        momentum * average + part
                        for average, part in zip(held_parts, parts, strict=True)
                    )
                    averages[one][path] = parts
                turned = turn.rotate(turned, -rate * parts[0], retraction)
                if stretches:
                    stretched += turn.stretch(w, parts[1])
            if stretches:
                turned -= rate * radial * stretched
            new = view.from_matrix(turned, kernel.shape)
            if path in master:
                master[path] = new
            # Narrower gradients must not round the steps of wider kernels.
            dtype = jnp.promote_types(gradient.dtype, held.dtype)
            return (new - held.astype(jnp.float32)).astype(dtype)

        with jax.default_matmul_precision("highest"):
            moves = map_paths(move, updates)
        masters = map_paths(lambda path, _: master[path], state.master)
        return moves, LieState(spectral, averages, masters, plain_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Turn:
    """The algebra of one side of one leaf.

    Matrices W and G are flat: `(*batch, d, n)` for rotations from the left,
    `(*batch, n, d)` for those from the right, in which the formulas hold for the
    transposed matrices. Window taps share a rotation, and are among the n.
    """

    def __init__(self, side: str, entry: TrackedBasis | None, shape: tuple[int, ...]):
        self._left, self._shape = side == "input", shape
        # A side that is not tracked is rotated whole: V = I.
        self._whole = entry is None
        dim = shape[-2 + SIDES.index(side)]
        self._v = jnp.eye(dim, dtype=jnp.float32)
        if entry is not None:
            self._v = entry.basis.vectors

    def _flat(self, stack: jax.Array) -> jax.Array:
        *batch, window, d_in, d_out = self._shape
        if not self._left:
            return stack.reshape(*batch, window * d_in, d_out)
        return jnp.moveaxis(stack, -3, -2).reshape(*batch, d_in, window * d_out)

    def _stack(self, flat: jax.Array) -> jax.Array:
        *batch, window, d_in, d_out = self._shape
        if not self._left:
            return flat.reshape(self._shape)
        return jnp.moveaxis(flat.reshape(*batch, d_in, window, d_out), -2, -3)

    def _down(self, flat: jax.Array, v: jax.Array) -> jax.Array:
        """`WᵀV`, shape `(*batch, n, k)`."""
        return left_product(flat, v) if self._left else flat @ v

    def _up(self, flat: jax.Array, t: jax.Array) -> jax.Array:
        """`W T`, shape `(*batch, d, k)`."""
        return flat @ t if self._left else left_product(flat, t)

    def _outer(self, v: jax.Array, t: jax.Array) -> jax.Array:
        """`V Tᵀ`, flat."""
        return v @ t.mT if self._left else t @ v.mT

    def elements(self, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Y and Z, shape `(*batch, d, k)`."""
        w, g = self._flat(w), self._flat(g)
        left = self._up(g, self._down(w, self._v))
        right = self._up(w, self._down(g, self._v))
        return self._halved(0.5 * (right - left)), self._halved(0.5 * (left + right))

    def _halved(self, x: jax.Array) -> jax.Array:
        """`(I − ½P) X`: what is inside counts from both sides."""
        return x - 0.5 * self._v @ (self._v.mT @ x)

    def transported(
        self, parts: tuple[jax.Array, ...], old: TrackedBasis | None
    ) -> tuple[jax.Array, ...]:
        """Y and Z of the same elements, projected on a refreshed basis."""
        if old is None:
            return parts
        before = old.basis.vectors
        turned = before.mT @ self._v  # VᵀV'
        return tuple(
            self._halved(x @ turned + sign * before @ (x.mT @ self._v))
            for x, sign in zip(parts, (-1, 1), strict=False)
        )

    def rotate(self, w: jax.Array, y: jax.Array, retraction: str) -> jax.Array:
        """`exp(VYᵀ − YVᵀ) W`."""
        u, inside = self._v, self._v.mT @ y
        j = inside.mT - inside
        if not self._whole:
            # The other directions of Y; all there are, where k of them do not fit.
            dim, rank = self._v.shape[-2:]
            outside = (y - self._v @ inside)[..., : dim - rank]
            extend = linalg.extend_basis
            for _ in y.shape[:-2]:
                extend = jax.vmap(extend)
            q = extend(self._v, outside)
            u, across = jnp.concatenate([self._v, q], axis=-1), q.mT @ y
            corner = jnp.zeros((*across.shape[:-1], across.shape[-2]), y.dtype)
            j = jnp.block([[j, across.mT], [-across, corner]])
        turn = rotation_change(j, retraction)
        flat = self._flat(w)
        return w + self._stack(self._outer(u, self._down(flat, u) @ turn.mT))

    def stretch(self, w: jax.Array, z: jax.Array) -> jax.Array:
        """`(VZᵀ + ZVᵀ) W`."""
        flat, v = self._flat(w), self._v
        parts = self._outer(v, self._down(flat, z)), self._outer(z, self._down(flat, v))
        return self._stack(parts[0] + parts[1])


def _without(tree: Any, views: Mapping[str, MatrixView]) -> Any:
    """A tree with holes where the leaves are rotated."""
    return map_paths(lambda path, leaf: None if path in views else leaf, tree)
