"""Refreshing bases: what one solve does, and how leaves of one shape share it.

A refresh is a large program to compile and small work to run. So leaves with signals
of one shape go through one compiled solve, as many at once as are due in one step.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dsbp_jax import batching, checks, linalg
from dsbp_jax.layers import MatrixView
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.tracking.eigenspace import SIDES, Eigenspace, rotation
from dsbp_jax.tracking.signals import Signal

# A cold solve repeats refreshes until the basis is this close to invariant: a
# minibatch's gradient or covariance is itself no better known.
_COLD_TOLERANCE = 1e-2
_COLD_REFRESHES = 16

K = TypeVar("K")


class Label(NamedTuple):
    """What a basis is of; static. In numbers and strings, which msgpack takes.

    Attributes:
      side: `"input"` or `"output"`.
      source: What it follows.
      shape: That of the leaf.
      input_axes: Those of the leaf's `MatrixView`.
      output_axes: Likewise.
      batch_axes: Likewise.
    """

    side: str
    source: str
    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]

    @property
    def view(self) -> MatrixView:
        """How the leaf is a matrix."""
        return MatrixView(self.input_axes, self.output_axes, self.batch_axes)

    @property
    def dims(self) -> dict[str, int]:
        """The dimensions of both sides."""
        return dict(zip(SIDES, self.view.matrix_shape(self.shape)[-2:], strict=True))


class TrackedBasis(NamedTuple):
    """An eigenbasis and how its tracking goes; one per leaf and side.

    A named tuple, so that every library that writes optimizer states to disk takes it;
    its label is part of its type, and no array.

    Attributes:
      basis: The basis carried since the last refresh.
      drift: Mean squared sine of the angles between the last two bases, shape
        `(*batch)`, float32.
      refreshes: Successful refreshes so far, shape `(*batch)`, int32.
      failures: Refreshes refused because their result was not finite or not
        orthonormal, shape `(*batch)`, int32.
      label: Of which leaf's axes and which side it is; static.
    """

    basis: EigenBasis
    drift: jax.Array
    refreshes: jax.Array
    failures: jax.Array
    label: Label | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a leaf of this shape is the one, or a device's part of its stack."""
        assert self.label is not None
        if len(shape) != len(self.label.shape):
            return False
        batch = tuple(shape[axis] for axis in self.label.batch_axes)
        pairs = enumerate(zip(shape, self.label.shape, strict=True))
        return batch == self.refreshes.shape and all(
            size == known
            for axis, (size, known) in pairs
            if axis not in self.label.batch_axes
        )

    @property
    def space(self) -> Eigenspace:
        """The basis with its label."""
        assert self.label is not None
        label, solved = self.label, self.refreshes > 0
        return Eigenspace(self.basis, solved, label.view, label.side, label.source)


_ARRAYS = TrackedBasis._fields[:-1]
jax.tree_util.register_pytree_with_keys(
    TrackedBasis,
    lambda entry: (
        [(jax.tree_util.GetAttrKey(name), getattr(entry, name)) for name in _ARRAYS],
        entry.label,
    ),
    lambda label, arrays: TrackedBasis(*arrays)._replace(label=label),
)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A leaf that may be due.

    Attributes:
      entry: Its basis.
      signal: Gives what the basis follows; called where a solve needs it.
      due: Whether the schedule asks for it, shape `()`, bool.
      turn: The step of the period at which it is due; static.
    """

    entry: TrackedBasis
    signal: Callable[[], Signal]
    due: jax.Array
    turn: int


def refresh_due(
    refreshes: Mapping[K, Refresh], *, num_blocks: int, tolerance: float
) -> dict[K, TrackedBasis]:
    """Refreshes the leaves that are due, or see their first signal.

    Args:
      refreshes: The leaves, by any key.
      num_blocks: Krylov blocks of a refresh.
      tolerance: Only rotate a basis while its relative residual is at most this.

    Returns:
      Their new entries.
    """
    labels = {key: one.entry.label for key, one in refreshes.items()}
    # Leaves of one shape are stacked, whatever their axes are called.
    bare = {
        key: dataclasses.replace(one, entry=one.entry._replace(label=None))
        for key, one in refreshes.items()
    }
    wanted = dict(zip(bare, _wanted(list(bare.values())), strict=True))
    groups: dict[Any, list[K]] = {}
    for key, one in bare.items():
        form = (*_form(one.signal), one.entry.basis.vectors.shape)
        groups.setdefault(form, []).append(key)
    result: dict[K, TrackedBasis] = {}
    for (operator, _, (*batch, _, _)), keys in groups.items():
        solve = functools.partial(
            _solve, operator=operator, num_blocks=num_blocks, tolerance=tolerance
        )
        for _ in batch:
            solve = jax.vmap(solve, in_axes=(0, 0, 0, None, None))
        run = _refresh_one if len(keys) == 1 else _refresh_group
        found = run([bare[key] for key in keys], [wanted[key] for key in keys], solve)
        result.update(zip(keys, found, strict=True))
    return {key: result[key]._replace(label=labels[key]) for key in refreshes}


def _form(signal: Callable[[], Signal]) -> tuple[Any, tuple[Any, ...]]:
    """The static parts of a signal: its operator and its shapes."""
    operator = []

    def arrays() -> tuple[jax.Array, ...]:
        made = signal()
        operator.append(made.operator)
        return made.arrays

    shapes = tuple((x.shape, x.dtype) for x in jax.eval_shape(arrays))
    return operator[0], shapes


def _wanted(refreshes: Sequence[Refresh]) -> list[jax.Array]:
    """Whether each leaf is to be solved; one answer for a whole batch under `vmap`.

    A leaf that was never solved is, at its first signal. Whether there is one is looked
    at only while some leaf is cold, which may be for ever (frozen, never routed).
    """
    cold = [one.entry.refreshes == 0 for one in refreshes]
    some = functools.reduce(jnp.logical_or, map(_any, cold))
    axes = varying_axes(*(one.entry for one in refreshes))
    nothing = vary([jnp.array(False)] * len(refreshes), axes)

    def first_signals() -> list[jax.Array]:
        return [
            _any(one.signal().present() & flag)
            for one, flag in zip(refreshes, cold, strict=True)
        ]

    first = jax.lax.cond(
        batching.unbatched_max(some) > 0, first_signals, lambda: nothing
    )
    return [
        batching.unbatched_max(one.due | flag) > 0
        for one, flag in zip(refreshes, first, strict=True)
    ]


def _any(flags: jax.Array) -> jax.Array:
    return jnp.any(flags) if flags.ndim else flags


def _refresh_one(
    group: Sequence[Refresh],
    wanted: Sequence[jax.Array],
    solve: Callable[..., TrackedBasis],
) -> list[TrackedBasis]:
    (one,) = group

    def run(entry: TrackedBasis) -> TrackedBasis:
        signal = one.signal()
        return solve(entry, signal.arrays, signal.count, one.due, jnp.array(True))

    return [jax.lax.cond(wanted[0], run, lambda entry: entry, one.entry)]


def _refresh_group(
    group: Sequence[Refresh],
    flags: Sequence[jax.Array],
    solve: Callable[..., TrackedBasis],
) -> list[TrackedBasis]:
    """Leaves of one shape: gathered, solved together, put back, until all are done."""
    turns = [one.turn for one in group]
    slots = max(turns.count(turn) for turn in turns)
    arrays = [lambda one=one: one.signal()[:2] for one in group]
    if slots > 1:
        solve = jax.vmap(solve)
    wanted = jnp.stack(flags)
    due = jnp.stack([one.due for one in group])
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def step(carry: tuple) -> tuple:
        waiting, entries = carry
        # Those that wait come first; a slot left over solves nothing.
        chosen = jnp.argsort(~waiting, stable=True)[:slots]
        xs, count = stack([jax.lax.switch(leaf, arrays) for leaf in chosen])
        take = lambda leaf: leaf[chosen]
        given = (jax.tree.map(take, entries), xs, count, due[chosen], waiting[chosen])
        if slots == 1:
            given = jax.tree.map(lambda leaf: leaf[0], given)
        solved = solve(*given)
        put = lambda leaf, new: leaf.at[chosen].set(new)
        return waiting.at[chosen].set(False), jax.tree.map(put, entries, solved)

    def run(entries: list[TrackedBasis]) -> list[TrackedBasis]:
        unfinished = lambda carry: jnp.any(carry[0])
        _, solved = jax.lax.while_loop(unfinished, step, (wanted, stack(entries)))
        return [
            jax.tree.map(lambda leaf, i=i: leaf[i], solved) for i in range(len(group))
        ]

    entries = [one.entry for one in group]
    return jax.lax.cond(jnp.any(wanted), run, lambda entries: entries, entries)


def _solve(
    entry: TrackedBasis,
    arrays: tuple[jax.Array, ...],
    count: jax.Array,
    due: jax.Array,
    active: jax.Array,
    *,
    operator: Callable[..., linalg.SymmetricOperator],
    num_blocks: int,
    tolerance: float | jax.Array,
) -> TrackedBasis:
    """A cold solve, a warm refresh if due, or nothing, for one basis."""
    c = operator(*arrays, count)
    cold = entry.refreshes == 0
    finite = jnp.isfinite(c.trace) | ~(cold | due) | ~active
    # Without a signal (a layer behind zero-initialised ones) there is nothing to
    # solve, and the leaf stays cold.
    limit = jnp.where(cold, _COLD_REFRESHES, due.astype(jnp.int32))
    limit = jnp.where(active & (c.trace > 0), limit, 0)
    # A random start is never near enough; what follows it is.
    if not checks.is_static(tolerance, 0):
        tolerance = jnp.where(cold, -1.0, tolerance)

    def wanted(residual: jax.Array, ok: jax.Array, step: jax.Array) -> jax.Array:
        rough = (step == 0) | (residual > _COLD_TOLERANCE)
        return (step < limit) & rough & ok

    def refine(carry: tuple) -> tuple:
        basis, residual, ok, step = carry
        new, info = linalg.refresh_with_info(
            c, basis, num_blocks=num_blocks, tolerance=tolerance
        )
        # Under vmap the loop runs until the last is done; the others wait.
        take = wanted(residual, ok, step)
        basis = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, basis)
        residual = jnp.where(take, info.residual, residual)
        return basis, residual, ok & (info.ok | ~take), step + 1

    def unfinished(carry: tuple) -> jax.Array:
        return batching.unbatched_max(wanted(*carry[1:])) > 0

    start = (entry.basis, jnp.float32(0), finite, jnp.int32(0))
    start = vary(start, varying_axes(entry, c))
    basis, _, ok, _ = jax.lax.while_loop(unfinished, refine, start)
    done = ok & (limit > 0)
    overlap = rotation(basis.vectors, entry.basis.vectors)
    moved = 1 - jnp.sum(overlap**2) / overlap.shape[0]
    return TrackedBasis(
        basis=basis,
        drift=jnp.where(done & ~cold, jnp.maximum(moved, 0), entry.drift),
        refreshes=entry.refreshes + done.astype(jnp.int32),
        failures=entry.failures + (~ok).astype(jnp.int32),
    )
