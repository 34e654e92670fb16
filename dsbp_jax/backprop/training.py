"""Training in spectral coordinates, owned: steps, folds by turns, decay, parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import checks
from dsbp_jax.backprop.coordinates import spectral_coordinates
from dsbp_jax.backprop.frame import Frame
from dsbp_jax.backprop.shrink import decay_since, log_decay
from dsbp_jax.layers import leaves_by_path, map_paths
from dsbp_jax.tracking import Coordinate, Rule, transport_moments


class TrainingState(NamedTuple):
    """All that training carries from one step to the next; a pytree of arrays.

    Attributes:
      coords: What the optimizer moves.
      frame: What the coordinates stand on.
      opt_state: The optimizer's state.
      step: Steps done; numpy's, since the host asks for it.  # shape=(), dtype=int32
    """

    coords: Any
    frame: Frame
    opt_state: optax.OptState
    step: np.ndarray


class SpectralTraining(NamedTuple):
    """Training of one loss by one optimizer: three functions.

    Attributes:
      init: `init(params, *args, key=key, donate=False) -> state`; `args` as the loss
        gets them. With `donate=True` the params are gone, and no copy was made.
      step: `step(state, *args) -> (state, value)`; with `has_aux` the second is
        `(value, aux)`. The state that it was given is gone. Compiled by itself: it is
        not for `jax.jit`.
      params: `params(state) -> params`, of the model.
    """

    init: Callable[..., TrainingState]
    step: Callable[..., tuple[TrainingState, Any]]
    params: Callable[[TrainingState], Any]


def spectral_training(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | Callable[[Frame], Any],
    rank: int = 64,
    *,
    fold_every: int = 20,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    tracking: int | None = None,
    turns: int = 8,
    has_aux: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    transport: Mapping[str, Rule] | None = None,
) -> SpectralTraining:
    """`spectral_coordinates` with all that belongs to training around it.

    In each period of `fold_every` steps every leaf is folded once, group by group, from
    what its own step saw: no step takes long, and none is repeated for a fold. A fold
    writes into the kernel that is there. So what training holds are the kernels, with
    Adam 3·rank/d of them for coordinates and moments and a rank/d for the columns, and
    what one step needs.

    To save, write the state as any pytree; to resume, read it back in the place of
    `init`'s: what follows is the same, bit for bit.

    Args:
      loss_fn: `loss_fn(params, *args)`, a floating-point scalar; a pair of it and
        anything with `has_aux`.
      tx: The optimizer, of coordinates and of leaves that are trained whole. Or a
        function from the frame to it, where it wants to know how coordinates are
        matrices: `dsbp_jax.backprop.views(frame)` and `.sizes(frame)` say it.
      rank: Columns of V.
      fold_every: Steps between two folds of a leaf.
      learning_rate: That of `tx`, a number or a schedule, by which weights decay.
      weight_decay: Decoupled decay of all leaves with two axes or more, times the
        learning rate. Not that of `tx`, which would pull coordinates to the last fold.
      tracking: As for `spectral_coordinates`, like all that follow.
      turns: Likewise.
      has_aux: Likewise.
      betas: Likewise.
      transport: Likewise.

    Returns:
      The three functions.

    Raises:
      ValueError: An argument does not fit, there is decay without a learning rate, or
        (in `init`) the optimizer cannot work on coordinates.

    References:
      As for `spectral_coordinates`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"] - 1) ** 2)
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> x = jax.random.normal(jax.random.key(0), (128, 64))
      >>> rate = optax.cosine_decay_schedule(1e-2, 100)
      >>> training = spectral_training(
      ...     loss_fn, optax.adam(rate), rank=8, learning_rate=rate, weight_decay=0.1
      ... )
      >>> state = training.init(params, x, key=jax.random.key(1))
      >>> for _ in range(3):
      ...     state, value = training.step(state, x)
      >>> training.params(state)["kernel"].shape
      (64, 32)
    """
    every = checks.positive_int("fold_every", fold_every)
    checks.non_negative("weight_decay", weight_decay)
    decays = not checks.is_static(weight_decay, 0)
    if decays and learning_rate is None:
        raise ValueError(
            "learning_rate must be that of tx, a number or a schedule, because "
            f"weight_decay={weight_decay!r}, got None"
        )
    turns = checks.positive_int("turns", turns)
    coordinates = spectral_coordinates(
        loss_fn,
        rank,
        tracking=tracking,
        turns=min(turns, every),
        has_aux=has_aux,
        betas=betas,
        transport=transport,
    )

    def optimizer(frame: Frame) -> optax.GradientTransformation:
        return tx if hasattr(tx, "update") else tx(frame)

    def start(params: Any, args: tuple, key: jax.Array) -> tuple[Any, Frame, Any]:
        coords, frame = coordinates.init(params, *args, key=key)
        return coords, frame, optimizer(frame).init(coords)

    def move(
        coords: Any,
        frame: Frame,
        opt_state: optax.OptState,
        step: jax.Array,
        args: tuple,
        *,
        turn: int | None,
    ) -> tuple[Any, ...]:
        value, grads, *seen = coordinates.value_and_grad(
            coords, frame, *args, observe=turn is not None, turn=turn
        )
        updates, opt_state = optimizer(frame).update(grads, opt_state, coords)
        if decays:
            kept = log_decay(learning_rate, weight_decay, step, step + 1)
            share = -jnp.expm1(kept)
            updates = _decayed(updates, coords, frame, share)
        return optax.apply_updates(coords, updates), opt_state, value, seen

    left = jax.jit(
        lambda first, last: decay_since(learning_rate, weight_decay, first, last)
    )
    run = jax.jit(move, static_argnames="turn", donate_argnums=(0, 2))
    starts = {
        donate: jax.jit(start, donate_argnums=0 if donate else ())
        for donate in (False, True)
    }

    def init(
        params: Any, *args: Any, key: jax.Array, donate: bool = False
    ) -> TrainingState:
        coords, frame, opt_state = starts[donate](params, args, key)
        check = functools.partial(_follows, betas=betas, rules=transport)
        jax.eval_shape(check, coords, frame, opt_state)
        return TrainingState(coords, frame, opt_state, np.array(0, np.int32))

    def last_fold(turn: int, done: int, frame: Frame) -> int:
        """After how many steps, `done` at most, a group was folded last."""
        return max(0, done - (done - 1 - offset(turn, frame)) % every)

    def offset(turn: int, frame: Frame) -> int:
        """At which step of a period a group is folded."""
        return (turn + 1) * every // coordinates.turns(frame) - 1

    def step(state: TrainingState, *args: Any) -> tuple[TrainingState, Any]:
        coords, frame, opt_state, number = state
        done, numbers = int(number), range(coordinates.turns(frame))
        due = {offset(turn, frame): turn for turn in numbers if frame.kernels}
        turn = due.get(done % every)
        coords, opt_state, value, seen = run(
            coords, frame, opt_state, number, args, turn=turn
        )
        if turn is not None:
            shrink = None
            if decays:
                shrink = left(last_fold(turn, done, frame), done + 1)
            coords, frame, opt_state = coordinates.fold(
                coords, frame, opt_state, *seen, turn=turn, shrink=shrink, donate=True
            )
        return TrainingState(
            coords, frame, opt_state, np.array(done + 1, np.int32)
        ), value

    def settled(coords: Any, frame: Frame, step: jax.Array, firsts: Any) -> Any:
        whole = coordinates.merge(coords, frame)
        if not decays:
            return whole
        shrink = lambda path, leaf: (
            (leaf * left(firsts[path], step)).astype(leaf.dtype)
            if path in firsts
            else leaf
        )
        return map_paths(shrink, whole)

    merge = jax.jit(settled)

    def params(state: TrainingState) -> Any:
        coords, frame, _, number = state
        firsts = {
            path: np.int32(last_fold(turn, int(number), frame))
            for turn in range(coordinates.turns(frame))
            for path in coordinates.group(frame, turn)
        }
        return merge(coords, frame, number, firsts)

    return SpectralTraining(init, step, params)


def _decayed(updates: Any, coords: Any, frame: Frame, share: jax.Array) -> Any:
    """Updates that also shrink the leaves that are trained whole, and matrices."""
    held = leaves_by_path(coords)
    return map_paths(
        lambda path, update: (
            update
            if path in frame.kernels or held[path].ndim < 2
            else (update - share * held[path]).astype(update.dtype)
        ),
        updates,
    )


def _follows(coords: Any, frame: Frame, opt_state: Any, **options: Any) -> Any:
    """Moves an optimizer's state by no angle: an error where it cannot follow."""

    def still(path: str, leaf: Any) -> Coordinate | None:
        if path not in frame.kernels:
            return None
        batch, size = frame.layout[path].batch_axes, leaf.shape[-2]
        shape = (*leaf.shape[: len(batch)], size, size)
        return Coordinate(leaf.shape, jnp.zeros(shape))

    return transport_moments(opt_state, map_paths(still, coords), **options)
