"""Moment transport: an optimizer's state follows the basis its coordinates are in.

When coordinates S in a basis V become coordinates in V', whatever an optimizer has
averaged over S must be rotated by `R = V'ᵀV`, or it belongs to directions that are no
longer there. First moments rotate as vectors do. Second moments are elementwise and do
not: with m and v bias-corrected, the variance `v − m²` moves by the squares of R, and
the square of the rotated mean is put back,

    v' = |(R∘R)(v − m²) + (Rm)²|.

What holds a variance already (AdaBelief) moves by the squares of R alone. A basis that
an optimizer keeps of coordinates themselves (`spectral_whitening`) turns with them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, KeyPath

from dsbp_jax import linalg
from dsbp_jax.layers import canonical_path
from dsbp_jax.tracking.eigenspace import SIDES, wide
from dsbp_jax.tracking.reading import map_spectral_states
from dsbp_jax.tracking.tracked_basis import TrackedBasis
from dsbp_jax.tracking.tracker import SpectralState

#: How a field of an optimizer's state moves, by its name.
MOMENTS = {
    "mu": "first",
    "trace": "first",
    "ema": "first",
    "acc_grads": "first",
    "nu": "second",
}
_RULES = ("first", "second", "variance", "keep")

Rule = str | Callable[[jax.Array, Any], jax.Array]


class Coordinate(NamedTuple):
    """One leaf of coordinates that changes its basis.

    Attributes:
      shape: Of the leaf, `(*batch, [window,] m, n)`.
      left: `V'ᵀV` of a basis of its rows, shape `(*batch, m, m)`, or None.
      right: The same of its columns, shape `(*batch, n, n)`, or None.
    """

    shape: tuple[int, ...]
    left: jax.Array | None = None
    right: jax.Array | None = None

    def rotate(self, x: jax.Array, power: int = 1) -> jax.Array:
        """`L x Rᵀ`, of the entries' powers, the same for all window taps."""
        return _rotate(self.left, self.right, x, power)


@functools.partial(jax.jit, static_argnums=3)  # traced once for all leaves of a shape
def _rotate(
    left: jax.Array | None, right: jax.Array | None, x: jax.Array, power: int
) -> jax.Array:
    y = x.astype(wide(x.dtype))
    taps = lambda r: (r[..., None, :, :] if x.ndim > r.ndim else r).astype(y.dtype)
    with jax.default_matmul_precision("highest"):
        if left is not None:
            y = taps(left**power) @ y
        if right is not None:
            y = y @ taps(right**power).mT
    return y.astype(x.dtype)


def transport_moments(
    opt_state: optax.OptState,
    coordinates: Any,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    rules: Mapping[str, Rule] | None = None,
) -> optax.OptState:
    """Moves an optimizer's state from one basis to the next.

    Inside the state are trees like that of the parameters: a leaf belongs to the
    parameter at whose place it is, in the tree that holds the most of them (names do
    not count). The field that holds it decides how it moves:
    `mu`, `trace`, `ema` and `acc_grads` as first moments, `nu` as second. A tracked
    basis of coordinates becomes `RV`, made orthonormal, on the side that turns. (That
    `nu`
    is the variance in AdaBelief, and a largest value in Adamax, its name does not
    tell: the first wants `rules={"nu": "variance"}`, the second cannot follow.)

    Args:
      opt_state: The state of any optimizer on the coordinates.
      coordinates: A tree like the params that the optimizer sees, with a `Coordinate`
        for each leaf, or None for one that stays as it is.
      betas: Decay rates of the first and second moment of Adam and its kin, for
        their bias correction.
      rules: Field name to `"first"`, `"second"`, `"variance"`, `"keep"` or a function
        `(moment, coordinate) -> moment`, in addition to the above or in their place.

    Returns:
      The state in the new basis.

    Raises:
      ValueError: A field that belongs to a coordinate has no rule or another shape, or
        a field with a rule belongs to no parameter (as under `optax.flatten`).

    References:
      Robert et al., LDAdam, ICLR 2025, for the second moment.

    Example:
      >>> import optax
      >>> state = optax.sgd(0.1, momentum=0.9).init({"s": jnp.array([[1.0], [0.0]])})
      >>> state = jax.tree.map(lambda x: jnp.array([[1.0], [0.0]]), state)
      >>> swap = Coordinate((2, 1), jnp.array([[0.0, 1.0], [1.0, 0.0]]))
      >>> transport_moments(state, {"s": swap})[0].trace["s"].ravel()
      Array([0., 1.], dtype=float32)
    """
    known: dict[str, Rule] = {**MOMENTS, **(rules or {})}
    for field, wanted in known.items():
        if not callable(wanted) and wanted not in _RULES:
            raise ValueError(
                f"transport[{field!r}] must be a function or one of "
                f"{', '.join(map(repr, _RULES))}, got {wanted!r}"
            )
    is_leaf = lambda node: node is None or isinstance(node, Coordinate)
    known_leaves = jax.tree.leaves_with_path(coordinates, is_leaf=is_leaf)
    turns = {
        canonical_path(path): leaf for path, leaf in known_leaves if leaf is not None
    }
    opt_state = map_spectral_states(functools.partial(_turned, turns), opt_state)
    flat, treedef = jax.tree.flatten_with_path(opt_state)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    found = {_bare(path): coordinate for path, coordinate in known_leaves}
    starts = _starts([path for path, _ in flat], list(found))
    moved = []
    for (path, leaf), at in zip(flat, starts, strict=True):
        field = _field(path if at is None else path[:at])
        rule = known.get(field)
        coordinate = None if at is None else found[_bare(path[at:])]
        lost = at is None and rule is not None
        if not jnp.ndim(leaf) or rule == "keep" or not (coordinate or lost):
            moved.append(leaf)
            continue
        if coordinate is None or rule is None or jnp.shape(leaf) != coordinate.shape:
            owner = "no parameter"
            if coordinate is not None:
                owner = f"coordinates of shape {coordinate.shape}"
            raise ValueError(
                f"the optimizer's state holds {jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)} for {owner}; what can follow a change of basis are "
                f"the fields {', '.join(known)} in the shape of their coordinates, and "
                f'with transport={{{field!r}: "first" | "second" | "variance" | "keep" '
                "| function} what that names"
            )
        if callable(rule):
            moved.append(rule(leaf, coordinate))
        elif rule == "first":
            moved.append(coordinate.rotate(leaf))
        elif rule == "variance":
            moved.append(coordinate.rotate(leaf, 2))
        else:
            assert at is not None
            beside, parameter = path[: at - 1], path[at:]
            sibling = lambda name, *rest, beside=beside: leaves.get(
                jax.tree_util.keystr((*beside, GetAttrKey(name), *rest))
            )
            mean, count = sibling("mu", *parameter), sibling("count")
            moved.append(_second(coordinate, leaf, mean, count, betas))
    return jax.tree.unflatten(treedef, moved)


def _turned(turns: Mapping[str, Coordinate], state: SpectralState) -> SpectralState:
    """Bases of coordinates that turn."""

    def turned(side: str, path: str, entry: TrackedBasis) -> TrackedBasis:
        if path not in turns:
            return entry
        coordinate, label = turns[path], entry.label
        assert label is not None
        if label.shape != coordinate.shape or label.source != "gradient":
            raise ValueError(
                f"the optimizer's state holds a basis of {path!r} that follows its "
                f"{label.source} in the shape {label.shape}, for coordinates of shape "
                f"{coordinate.shape}; what can follow a change of basis are bases of "
                "their own updates"
            )
        matrix = coordinate.left if side == SIDES[0] else coordinate.right
        if matrix is None:
            return entry
        columns = Coordinate(entry.vectors.shape, matrix).rotate(entry.vectors)
        again = lambda block: linalg.extend_basis(jnp.zeros((len(block), 0)), block)
        for _ in entry.refreshes.shape:
            again = jax.vmap(again)
        return entry._replace(basis=entry.basis._replace(vectors=again(columns)))

    tracked = {
        side: {path: turned(side, path, entry) for path, entry in entries.items()}
        for side, entries in state.tracked.items()
    }
    return state._replace(tracked=tracked)


def _second(
    coordinate: Coordinate,
    nu: jax.Array,
    mu: jax.Array | None,
    count: jax.Array | None,
    betas: tuple[float, float],
) -> jax.Array:
    """The second moment in the new basis."""
    if mu is None:
        return coordinate.rotate(nu, 2)
    return _second_with_mean(coordinate.left, coordinate.right, nu, mu, count, betas)


@jax.jit
def _second_with_mean(
    left: jax.Array | None,
    right: jax.Array | None,
    nu: jax.Array,
    mu: jax.Array,
    count: jax.Array | None,
    betas: tuple[float, float],
) -> jax.Array:
    mean, square = mu.astype(wide(mu.dtype)), nu.astype(wide(nu.dtype))
    # Both moments are short of their limits by factors; v is moved as it is, and m²
    # at the factor of v.
    share: Any = 1.0
    if count is not None:
        steps = jnp.maximum(count, 1).astype(jnp.float32)
        first, second = (1 - jnp.float32(beta) ** steps for beta in betas)
        share = (second / first**2).astype(mean.dtype)
    variance = square - share * mean**2
    turned = _rotate(left, right, mean, 1)
    moved = _rotate(left, right, variance, 2) + share * turned**2
    return jnp.abs(moved).astype(nu.dtype)


def _bare(path: KeyPath) -> KeyPath:
    """A path without the attribute at its end that variables of Flax nnx add."""
    return path[:-1] if path and path[-1] == GetAttrKey("value") else path


def _starts(
    paths: Sequence[KeyPath], parameters: Sequence[KeyPath]
) -> list[int | None]:
    """Where in each path of a state leaf that of its parameter begins.

    Of several places that in the tree which holds the most parameters, then the
    longest path: a parameter may be called like a field of the state.
    """
    known = set(parameters)
    places = [
        [at for at in range(len(path) + 1) if _bare(path[at:]) in known]
        for path in paths
    ]
    trees: dict[KeyPath, set[KeyPath]] = {}
    for path, starts in zip(paths, places, strict=True):
        for at in starts:
            trees.setdefault(path[:at], set()).add(_bare(path[at:]))
    most = lambda path: lambda at: (len(trees[path[:at]]), -at)
    return [
        max(starts, key=most(path)) if starts else None
        for path, starts in zip(paths, places, strict=True)
    ]


def _field(path: tuple[Any, ...]) -> str:
    """The name of the field that a path leads to."""
    for key in reversed(path):
        if isinstance(key, GetAttrKey):
            return key.name
    return jax.tree_util.keystr(path)
