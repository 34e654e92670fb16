"""Refreshing bases: what one solve does, and how leaves of one shape share it.

A refresh is a large program to compile and small work to run. So leaves with signals
of one shape go through one compiled solve: one after the other on a CPU, elsewhere as
many at once as are due in one step. What is left to compile are loops over entries,
which cost ten times what a product does; hence products where one would write a
loop, and stacks that the compiler sees equal loops of (`stacks`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dsbp_jax import batching, checks, linalg
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.meshes import vary, varying_axes
from dsbp_jax.stacks import places, unstacked
from dsbp_jax.tracking.eigenspace import rotation
from dsbp_jax.tracking.packing import Packed, packed, unpacked
from dsbp_jax.tracking.signals import Signal, present
from dsbp_jax.tracking.tracked_basis import TrackedBasis

# A cold solve repeats refreshes until the basis is this close to invariant: a
# minibatch's gradient or covariance is itself no better known.
_COLD_TOLERANCE = 1e-2
_COLD_REFRESHES = 16

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A leaf that may be due.

    Attributes:
      entry: Its basis.
      signal: Gives what the basis follows; called where a solve needs it.
      turn: The step of the period at which it is due; static.
      beside: Orthonormal columns `(*batch, d, m)` that the basis is to be orthogonal
        to, and follows the signal outside of; or None.
    """

    entry: TrackedBasis
    signal: Callable[[], Signal]
    turn: int
    beside: jax.Array | None = None


def refresh_due(
    refreshes: Mapping[K, Refresh],
    step: jax.Array | None,
    *,
    num_blocks: int,
    tolerance: float,
    average: float = 0.0,
) -> dict[K, TrackedBasis]:
    """Refreshes the leaves that are due, or see their first signal.

    Args:
      refreshes: The leaves, by any key.
      step: The step of the period, shape `()`, int32; None where all are due.
      num_blocks: Krylov blocks of a refresh.
      tolerance: Only rotate a basis while its relative residual is at most this.
      average: The part of old eigenvalues and trace in those of a warm refresh.

    Returns:
      Their new entries.
    """
    # Leaves of one shape go together, whatever their axes are called.
    groups: dict[Any, list[K]] = {}
    for key, one in refreshes.items():
        beside = None if one.beside is None else one.beside.shape
        form = (*_form(one.signal), one.entry.vectors.shape, beside)
        groups.setdefault(form, []).append(key)
    result: dict[K, TrackedBasis] = {}
    for (operator, _, (*batch, _, _), _), keys in groups.items():
        solve = functools.partial(
            _solve,
            operator=operator,
            num_blocks=num_blocks,
            tolerance=tolerance,
            average=average,
        )
        for _ in batch:
            solve = jax.vmap(solve, in_axes=(0, 0, 0, 0, None, None))
        leaves = [refreshes[key] for key in keys]
        found = _Group.of(leaves, step, solve).refreshed()
        result.update(zip(keys, found, strict=True))
    return {key: result[key] for key in refreshes}


def _form(signal: Callable[[], Signal]) -> tuple[Any, tuple[Any, ...]]:
    """The static parts of a signal: its operator and its shapes."""
    operator = []

    def arrays() -> tuple[jax.Array, ...]:
        made = signal()
        operator.append(made.operator)
        return made.arrays

    shapes = tuple((x.shape, x.dtype) for x in jax.eval_shape(arrays))
    return operator[0], shapes


@dataclasses.dataclass(frozen=True)
class _Group:
    """Leaves of one shape, solved in a loop over those that are due or still cold.

    Attributes:
      leaves: The leaves.
      entries: Their entries.
      due: Whether the schedule asks for each, shape `(n,)`, bool.
      wanted: Whether each is to be looked at, shape `(n,)`, bool.
      solve: Solves one.
      axes: The mesh axes over which entries vary.
    """

    leaves: Sequence[Refresh]
    entries: list[Packed]
    due: jax.Array
    wanted: jax.Array
    solve: Callable[..., TrackedBasis]
    axes: frozenset[str]

    @classmethod
    def of(
        cls,
        leaves: Sequence[Refresh],
        step: jax.Array | None,
        solve: Callable[..., TrackedBasis],
    ) -> "_Group":
        """The group of some leaves, at a step of the period."""
        entries = [packed(one.entry._replace(label=None)) for one in leaves]
        axes = varying_axes(*entries)
        due = jnp.ones(len(leaves), bool)
        if step is not None:
            due = step == jnp.array([one.turn for one in leaves], jnp.int32)
        due = vary(due, axes)
        refreshes = jnp.stack([one.entry.refreshes for one in leaves])
        cold = jnp.min(refreshes.reshape(len(leaves), -1), axis=1) == 0
        wanted = batching.unbatched_max(due | cold) > 0
        return cls(leaves, entries, due, wanted, solve, axes)

    def refreshed(self) -> list[TrackedBasis]:
        """The new entries."""
        turns = [one.turn for one in self.leaves]
        slots = max(turns.count(turn) for turn in turns)
        first = self.following(vary(jnp.int32(-1), self.axes))
        some = first < len(self.leaves)

        def rows(entries: list[Packed]) -> Packed:
            start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *entries)
            # Where there is nothing but a CPU, no solve gains from another beside it.
            if slots == 1 or jax.default_backend() == "cpu":
                return self.solved(first, start)
            return jax.lax.platform_dependent(
                first,
                start,
                cpu=self.solved,
                default=functools.partial(self.solved_together, slots=slots),
            )

        def run(entries: list[Packed], numbers: list[jax.Array]) -> list:
            found = rows(entries)
            return [unstacked(found, number) for number in numbers]

        keep = lambda entries, numbers: entries
        numbers = places(some, len(self.leaves))
        found = jax.lax.cond(some, run, keep, self.entries, numbers)
        return [
            unpacked(entry)._replace(label=one.entry.label)
            for entry, one in zip(found, self.leaves, strict=True)
        ]

    def given(self, leaf: jax.Array) -> tuple:
        """The arrays and the count of a leaf's signal, and what it is beside."""
        branches = [
            lambda one=one: (*one.signal()[:2], one.beside) for one in self.leaves
        ]
        return jax.lax.switch(leaf, branches)

    def solve_packed(self, entry: Packed, *given: Any) -> Packed:
        """`solve` of an entry as the loops have it."""
        return packed(self.solve(unpacked(entry), *given))

    def following(self, leaf: jax.Array) -> jax.Array:
        """The next leaf to be looked at, or how many leaves there are."""
        numbers = jnp.arange(len(self.leaves), dtype=jnp.int32)
        later = jnp.where(self.wanted & (numbers > leaf), numbers, len(self.leaves))
        return jnp.min(later)

    def solved(self, first: jax.Array, entries: Packed) -> Packed:
        """Stacked entries, the wanted ones from the first on solved one by one."""

        def body(carry: tuple[jax.Array, Packed]) -> tuple:
            leaf, entries = carry
            arrays, count, beside = self.given(leaf)
            given = arrays, count, beside, self.due[leaf], jnp.array(True)
            # A cold leaf may never get a signal; what is beside others has to stay so.
            some = jnp.any(present(arrays)) if beside is None else jnp.array(True)
            new = jax.lax.cond(
                batching.unbatched_max(some) > 0,
                lambda entry: self.solve_packed(entry, *given),
                lambda entry: entry,
                unstacked(entries, leaf),
            )
            put = lambda entries, x: jax.lax.dynamic_update_index_in_dim(
                entries, x, leaf, 0, allow_negative_indices=False
            )
            return self.following(leaf), jax.tree.map(put, entries, new)

        return jax.lax.while_loop(self.unfinished, body, (first, entries))[1]

    def solved_together(self, first: jax.Array, entries: Packed, slots: int) -> Packed:
        """The same, so many at once."""
        size = len(self.leaves)

        def body(carry: tuple[jax.Array, Packed]) -> tuple:
            leaf, entries = carry
            leaves = [leaf]
            while len(leaves) < slots:
                leaves.append(self.following(leaves[-1]))
            chosen = jnp.stack(leaves)
            inside = jnp.minimum(chosen, size - 1)
            given = jax.lax.map(self.given, inside)
            old = jax.tree.map(lambda x: x[inside], entries)
            given = (*given, self.due[inside], chosen < size)
            new = jax.vmap(self.solve_packed)(old, *given)
            put = lambda entries, x: entries.at[chosen].set(x, mode="drop")
            return self.following(chosen[-1]), jax.tree.map(put, entries, new)

        return jax.lax.while_loop(self.unfinished, body, (first, entries))[1]

    def unfinished(self, carry: tuple[jax.Array, Packed]) -> jax.Array:
        """Whether a leaf is left."""
        return carry[0] < len(self.leaves)


def _solve(
    entry: TrackedBasis,
    arrays: tuple[jax.Array, ...],
    count: jax.Array | None,
    beside: jax.Array | None,
    due: jax.Array,
    active: jax.Array,
    *,
    operator: Callable[..., linalg.SymmetricOperator],
    num_blocks: int,
    tolerance: float | jax.Array,
    average: float,
) -> TrackedBasis:
    """A cold solve, a warm refresh if due, or nothing, for one basis."""
    if beside is not None:
        arrays = _outside(beside, arrays[0]), *arrays[1:]
    # Divided by the count at the end, where only eigenvalues are.
    c = operator(*arrays)
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
    if beside is not None:
        basis = basis._replace(vectors=linalg.extend_basis(beside, basis.vectors))
    done = ok & (limit > 0)
    overlap = rotation(basis.vectors, entry.basis.vectors)
    moved = 1 - jnp.sum(overlap**2) / overlap.shape[0]
    scale: Any = 1
    if count is not None:
        # No row counted is an empty covariance, not a division by zero.
        scale = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
    kept = jnp.where(cold, 0.0, average)

    def scaled(new: jax.Array, old: jax.Array) -> jax.Array:
        new = new * scale
        if not checks.is_static(average, 0):
            new = new + kept * (old - new)
        return jnp.where(done, new, old)

    basis = EigenBasis(
        basis.vectors,
        scaled(basis.values, entry.basis.values),
        scaled(basis.trace, entry.basis.trace),
    )
    return TrackedBasis(
        basis=basis,
        drift=jnp.where(done & ~cold, jnp.maximum(moved, 0), entry.drift),
        refreshes=entry.refreshes + done.astype(jnp.int32),
        failures=entry.failures + (~ok).astype(jnp.int32),
    )


def _outside(columns: jax.Array, x: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return x - columns @ (columns.T @ x)
