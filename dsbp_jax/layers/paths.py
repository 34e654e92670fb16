"""Canonical parameter paths: one string per leaf, the same everywhere.

A path is `jax.tree_util.keystr(path, simple=True, separator="/")` with a
trailing Flax nnx `value` attribute dropped: nnx initialises an optimizer on
variables (`dense/kernel/value`) and updates it on plain arrays
(`dense/kernel`), and both must name the same leaf.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath


def canonical_path(path: KeyPath) -> str:
    """The canonical name of a leaf.

    Args:
      path: A key path as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      The keys joined by `/`, without a trailing nnx `value` attribute.

    Example:
      >>> import jax
      >>> leaves, _ = jax.tree.flatten_with_path({"dense": {"kernel": 1.0}})
      >>> canonical_path(leaves[0][0])
      'dense/kernel'
    """
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, keyed by canonical path, in flattening order.

    Args:
      tree: Any pytree. `None` and `optax.MaskedNode` hold no leaves.

    Returns:
      A dict from canonical path to leaf.

    Raises:
      ValueError: Two leaves share one canonical path.

    Example:
      >>> leaves_by_path({"a": {"b": 1}, "c": [2, None]})
      {'a/b': 1, 'c/0': 2}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = canonical_path(path)
        if name in leaves:
            raise ValueError(
                f"two parameter leaves share the canonical path {name!r}; "
                "rename one so that every leaf has a path of its own"
            )
        leaves[name] = leaf
    return leaves


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps a function of canonical path and leaf over a tree.

    Args:
      function: `function(path, leaf)`.
      tree: Any pytree.

    Returns:
      A tree of the same structure.

    Example:
      >>> map_paths(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}, "c": None})
      {'a': {'b': 'a/b=1'}, 'c': None}
    """
    return jax.tree.map_with_path(
        lambda path, leaf: function(canonical_path(path), leaf), tree
    )


def require_paths(wanted: Iterable[str], known: Iterable[str], argument: str) -> None:
    """Checks that every wanted path is known, or names the nearest one.

    Args:
      wanted: Paths that must be present.
      known: Paths that are.
      argument: What `known` was passed as, for the message.

    Raises:
      ValueError: A wanted path is missing. The message names the argument, the
        path, and the nearest known path.

    Example:
      >>> require_paths(["Dense_0/kernel"], ["params/Dense_0/kernel"], "activations")
      Traceback (most recent call last):
      ...
      ValueError: activations has no entry for 'Dense_0/kernel'; the nearest of ...
    """
    known = list(known)
    for path in wanted:
        if path in known:
            continue
        # A shared suffix (another prefix of the same tree) beats edit distance.
        nearest = [name for name in known if name.endswith("/" + path)] or [
            name for name in known if path.endswith("/" + name)
        ]
        nearest = nearest or difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        hint = (
            f"the nearest of its {len(known)} paths is {nearest[0]!r}"
            if nearest
            else "it is empty"
        )
        raise ValueError(f"{argument} has no entry for {path!r}; {hint}")
