"""Reading the spectral state out of any optimizer state.

A spectral transform may sit anywhere in a chain, a mask or a wrapper; what it
carries is found by type, not by position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.eigenspace import SIDES, Eigenspace
from dsbp_jax.tracking.tracked_basis import TrackedBasis
from dsbp_jax.tracking.tracker import SpectralState


def eigenspaces(opt_state: Any) -> dict[str, tuple[Eigenspace, ...]]:
    """The labelled eigenspaces held anywhere in an optimizer state.

    Whatever takes bases takes these, and neither a side nor a layout beside them.

    Args:
      opt_state: The state of any optimizer that contains a spectral transform:
        chained, masked, injected, or that of a Flax `nnx.Optimizer`.

    Returns:
      A dict from canonical path to the eigenspaces of that leaf: one for each side and
      each transform that tracks it, in the order of the chain, the input side first.

    Raises:
      ValueError: The state holds no spectral state.

    Example:
      >>> import dsbp_jax
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> state = dsbp_jax.spectral_projection(2).init(params)
      >>> (space,) = dsbp_jax.eigenspaces(state)["kernel"]
      >>> space.side, space.source, space.vectors.shape, space.solved.item()
      ('output', 'gradient', (6, 2), False)
    """
    found: dict[str, tuple[Eigenspace, ...]] = {}
    for state in _required_states(opt_state):
        for path, spaces in state.spaces().items():
            found[path] = (*found.get(path, ()), *spaces)
    return found


def bases(opt_state: Any, *, side: str | None = None) -> dict[str, EigenBasis]:
    """The eigenbases held anywhere in an optimizer state, without their labels.

    To hand them to another use, take `eigenspaces`: of a square kernel nobody can tell
    which side a plain basis is of.

    Args:
      opt_state: As `eigenspaces`.
      side: `"input"` or `"output"`; may be None where no leaf has both.

    Returns:
      A dict from canonical path to basis. Where two transforms track one leaf, the
      basis of the first in the chain.

    Raises:
      ValueError: The state holds no spectral state, or both sides of a leaf are
        tracked and `side` is None.

    Example:
      >>> import dsbp_jax
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> state = dsbp_jax.spectral_projection(2).init(params)
      >>> dsbp_jax.bases(state)["kernel"].vectors.shape
      (6, 2)
    """
    entries = _of_one_side(opt_state, side)
    return {path: entry.basis for path, entry in entries.items()}


class Diagnostics(NamedTuple):
    """How well a tracked basis does; all of shape `(*batch)`.

    Attributes:
      captured: Share of the trace that the basis holds, float32; of `lie_rotation` an
        estimate, since its trace is one.
      tail: What it does not hold, `trace − Σλ`, float32.
      drift: Mean squared sine of the angles between the last two bases, float32.
      refreshes: Successful refreshes so far, int32.
      failures: Refused refreshes so far, int32.
    """

    captured: jax.Array
    tail: jax.Array
    drift: jax.Array
    refreshes: jax.Array
    failures: jax.Array


def diagnostics(opt_state: Any, *, side: str | None = None) -> dict[str, Diagnostics]:
    """Captured energy, tail, drift, refreshes and failures of every tracked leaf.

    Args:
      opt_state: As for `bases`.
      side: As for `bases`.

    Returns:
      A dict from canonical path to diagnostics, arrays on the device.

    Raises:
      ValueError: As `bases`.

    Example:
      >>> import dsbp_jax
      >>> tx = dsbp_jax.spectral_projection(1)
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> dsbp_jax.diagnostics(state)["kernel"].captured.item()
      0.900
    """
    result = {}
    for path, entry in _of_one_side(opt_state, side).items():
        held = jnp.sum(entry.basis.values, axis=-1)
        trace = entry.basis.trace
        result[path] = Diagnostics(
            captured=jnp.where(trace > 0, held / jnp.where(trace > 0, trace, 1), 0),
            tail=jnp.maximum(trace - held, 0),
            drift=entry.drift,
            refreshes=entry.refreshes,
            failures=entry.failures,
        )
    return result


def spectral_states(opt_state: Any) -> list[SpectralState]:
    """The spectral states in an optimizer state, in the order of the chain."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_state)
    return [_unwrapped(node) for node in nodes if _is_state(node)]


def map_spectral_states(function: Any, opt_state: Any) -> Any:
    """An optimizer state with a function of each of its spectral states in place."""
    change = lambda node: function(node) if _is_state(node) else node
    return jax.tree.map(change, opt_state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, SpectralState)


def _unwrapped(state: SpectralState) -> SpectralState:
    # Flax nnx wraps every array of an optimizer state in a variable.
    is_variable = lambda node: hasattr(node, "get_value")
    unwrap = lambda node: node.get_value() if is_variable(node) else node
    return jax.tree.map(unwrap, state, is_leaf=is_variable)


def _required_states(opt_state: Any) -> list[SpectralState]:
    states = spectral_states(opt_state)
    if not states:
        raise ValueError(
            f"opt_state must hold the state of a spectral transform, "
            f"got {type(opt_state).__name__} without one"
        )
    return states


def _of_one_side(opt_state: Any, side: str | None) -> dict[str, TrackedBasis]:
    """The first tracked basis of each leaf."""
    if side is not None:
        checks.one_of("side", side, SIDES)
    first: dict[tuple[str, str], TrackedBasis] = {}
    for state in _required_states(opt_state):
        first = state.entries() | first
    found: dict[str, TrackedBasis] = {}
    for name, path in first:
        if side not in (None, name):
            continue
        if path in found:
            raise ValueError(
                "side must be 'input' or 'output' where both sides are tracked, "
                f"as of {path!r}, got None"
            )
        found[path] = first[name, path]
    return found
