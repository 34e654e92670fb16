"""Reading the spectral state out of any optimizer state.

A spectral transform may sit anywhere in a chain, a mask or a wrapper; what it
carries is found by type, not by position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.signals import SIDES
from dsbp_jax.tracking.tracker import SpectralState, TrackedBasis


def bases(opt_state: Any, *, side: str | None = None) -> dict[str, EigenBasis]:
    """The eigenbases held anywhere in an optimizer state.

    Args:
      opt_state: The state of any optimizer that contains a spectral transform:
        chained, masked, injected, or that of a Flax `nnx.Optimizer`.
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
    entries = _tracked(opt_state, side)
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
    for path, entry in _tracked(opt_state, side).items():
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


def tracked_by_side(opt_state: Any) -> dict[str, dict[str, TrackedBasis]] | None:
    """Side to path to tracked basis, from anywhere in an optimizer state.

    Where two transforms track one side of a leaf, the first in the chain counts.
    None where there is no spectral transform.
    """
    is_state = lambda node: isinstance(node, SpectralState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    states = [node for node in nodes if is_state(node)]
    merged: dict[str, dict[str, TrackedBasis]] = {}
    for state in states:
        for side, entries in state.tracked.items():
            held = merged.setdefault(side, {})
            for path, entry in entries.items():
                held.setdefault(path, entry)
    return merged if states else None


def _tracked(opt_state: Any, side: str | None) -> dict[str, TrackedBasis]:
    if side is not None:
        checks.one_of("side", side, SIDES)
    tracked = tracked_by_side(opt_state)
    if tracked is None:
        raise ValueError(
            f"opt_state must hold the state of a spectral transform, "
            f"got {type(opt_state).__name__} without one"
        )
    # Flax nnx wraps every array of an optimizer state in a variable.
    is_variable = lambda node: hasattr(node, "get_value")
    unwrap = lambda node: node.get_value() if is_variable(node) else node
    found: dict[str, TrackedBasis] = {}
    for name in tracked if side is None else [side]:
        for path, entry in tracked.get(name, {}).items():
            if path in found:
                raise ValueError(
                    "side must be 'input' or 'output' where both sides are tracked, "
                    f"as of {path!r}, got None"
                )
            found[path] = jax.tree.map(unwrap, entry, is_leaf=is_variable)
    return found
