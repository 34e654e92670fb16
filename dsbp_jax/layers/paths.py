"""Canonical parameter paths: one string per leaf, the same everywhere.

A path is `jax.tree_util.keystr(path, simple=True, separator="/")`, without the
`value` attribute of a Flax nnx variable: nnx initialises an optimizer on variables
(`dense/kernel/value`) and updates it on plain arrays (`dense/kernel`), and both must
name the same leaf. Further uses of a leaf are `path#1`, `path#2`, and so on.
"""

import difflib
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath


def canonical_path(path: KeyPath) -> str:
    """The canonical name of a leaf of which nothing but the key path is known.

    A trailing `value` attribute is taken for that of an nnx variable. Where the tree
    is at hand, `leaves_with_path` looks, and so do `leaves_by_path` and `map_paths`.

    Args:
      path: A key path as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      The keys joined by `/`, without a trailing `value` attribute.

    Example:
      >>> import jax
      >>> leaves, _ = jax.tree.flatten_with_path({"dense": {"kernel": 1.0}})
      >>> canonical_path(leaves[0][0])
      'dense/kernel'
    """
    if path and path[-1] == _VALUE:
        path = path[:-1]
    return path_name(path)


def path_name(path: KeyPath) -> str:
    """The keys of a path from `leaves_with_path`, joined by `/`.

    Example:
      >>> path_name((jax.tree_util.DictKey("dense"), jax.tree_util.SequenceKey(0)))
      'dense/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_path(tree: Any) -> list[tuple[KeyPath, Any]]:
    """The leaves of a tree with their key paths, those of nnx variables shortened.

    Args:
      tree: Any pytree.

    Returns:
      Pairs of key path and leaf, in flattening order. The attribute `value` of a Flax
      variable (or of a box that carries names of axes) is no part of a path, one of
      the user's own class is.

    Example:
      >>> from typing import NamedTuple
      >>> Scaled = NamedTuple("Scaled", [("value", float)])
      >>> [(path, leaf)] = leaves_with_path({"w": Scaled(2.0)})
      >>> jax.tree_util.keystr(path), leaf
      ("['w'].value", 2.0)
    """
    found = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_variable):
        if not _is_variable(node):
            found.append((path, node))
            continue
        for inner, leaf in jax.tree.leaves_with_path(node):
            rest = inner[1:] if inner[:1] == (_VALUE,) else inner
            found.append(((*path, *rest), leaf))
    return found


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
    for path, leaf in leaves_with_path(tree):
        name = path_name(path)
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
    leaves = [function(path_name(path), leaf) for path, leaf in leaves_with_path(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def use_name(path: str, number: int) -> str:
    """The name of the use of a leaf after `number` others.

    Example:
      >>> use_name("kernel", 0), use_name("kernel", 2)
      ('kernel', 'kernel#2')
    """
    return f"{path}#{number}" if number else path


def is_further_use(name: str, names: Container[str]) -> bool:
    """Whether a name is that of a further use of another among `names`.

    A `#` of the user's own is none: what stands before it is no known name, or what
    comes after it no number.

    Args:
      name: A name, such as a key of captured activations.
      names: All of them.

    Returns:
      Whether it is `path#n` with `path` in `names`.

    Example:
      >>> names = {"w", "w#1", "a#b", "c#1"}
      >>> sorted(name for name in names if is_further_use(name, names))
      ['w#1']
    """
    path, mark, number = name.rpartition("#")
    # As written by `use_name`: no sign, no leading zero.
    written = number.isascii() and number.isdecimal() and number[0] != "0"
    return bool(mark) and written and path in names


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


_VALUE = GetAttrKey("value")


def _is_variable(node: Any) -> bool:
    """Whether a node is a Flax variable or box; told by what only these can do."""
    return all(hasattr(type(node), name) for name in ("add_axis", "remove_axis"))
