"""The role of each leaf in a model: what optimizers for hidden matrices need to know.

A shape cannot tell a head from a hidden layer, and neither can a name. Where the
answers of a leaf go can: those of a head reach the outputs without meeting another
leaf, and what a first layer meets has met none.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsbp_jax.layers.dataflow import meetings
from dsbp_jax.layers.finder import Trace, trace
from dsbp_jax.layers.layout import Layout, layout_of


class Roles(Mapping[str, str]):
    """What each leaf of a model is for, by canonical path; does not change.

    Args:
      roles: The role of each leaf.
      layout: How the model uses those that are matrices, as `dsbp_jax.layout` says.

    Example:
      >>> roles = Roles({"table": "hidden", "bias": "other"}, Layout())
      >>> roles.replace({"table": "embedding"})
      Roles({'table': 'embedding', 'bias': 'other'})
    """

    def __init__(self, roles: Mapping[str, str], layout: Layout) -> None:
        self._roles = dict(roles)
        self.layout = layout

    def __getitem__(self, path: str) -> str:
        """The role of a leaf."""
        return self._roles[path]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the paths, in the order of the params."""
        return iter(self._roles)

    def __len__(self) -> int:
        """The number of leaves."""
        return len(self._roles)

    def __repr__(self) -> str:
        """The roles, without the layout."""
        return f"Roles({self._roles})"

    def replace(self, roles: Mapping[str, str]) -> "Roles":
        """The same with other roles of some leaves.

        Raises:
          ValueError: If there is no such leaf.
        """
        for path in roles:
            if path not in self._roles:
                raise ValueError(
                    f"roles must name leaves of the model, got {path!r}; accepted are "
                    f"{', '.join(self._roles)}"
                )
        return Roles(self._roles | dict(roles), self.layout)


def roles(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Roles:
    """Reads off a model what each of its parameter leaves is for.

    Args:
      fn: A function `fn(params, *args, **kwargs)` that returns any pytree; a model or
        its loss.
      params: Its parameters; arrays or `jax.ShapeDtypeStruct`s, since nothing is
        computed.
      *args: Its other arguments, likewise.
      **kwargs: Likewise.

    Returns:
      A mapping from canonical path, in the order of the params, which has the model's
      `layout` besides:

      - `"embedding"`: rows of it are looked up, whatever else is done with it (tied
        embeddings are heads as well).
      - `"head"`: the outputs depend on its answers, and these met no other leaf on
        the way in a matrix product or convolution.
      - `"first"`: what it meets has met no other leaf, and was not looked up in one.
      - `"hidden"`: any other matrix that `layout` finds.
      - `"other"`: all the rest: biases, scales, leaves that are not found.

    Example:
      >>> import jax.numpy as jnp
      >>> def model(params, tokens):
      ...     x = params["embedding"][tokens]
      ...     return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]
      >>> params = {"embedding": jnp.ones((9, 2)), "up": jnp.ones((2, 4)),
      ...           "down": jnp.ones((4, 9)), "bias": jnp.ones(9)}
      >>> roles(model, params, jnp.array([3, 1]))["down"]
      'head'
      >>> roles(model, params, jnp.array([3, 1]))["up"]
      'hidden'
    """
    return roles_of(trace(fn, params, args, kwargs))


def roles_of(traced: Trace) -> Roles:
    """The same, of a function that was traced."""
    sites, lookups = traced.sites, traced.lookups
    keys = [site.key for site in sites]
    met = meetings(traced.body, sites, keys, [lookup.key for lookup in lookups])
    paths = [site.path for site in sites] + [lookup.path for lookup in lookups]
    # By leaf: which others its operands come from, and whether its answers meet others.
    before: dict[str, set[str]] = {site.path: set() for site in sites}
    for site in sites:
        origins = met[site.key].free | met[site.key].stopped
        found = {path for bit, path in enumerate(paths) if origins >> bit & 1}
        before[site.path] |= found - {site.path}
    ahead = set[str]().union(*before.values())
    looked_up = {lookup.path for lookup in lookups}
    reaching = {site.path for site in sites if site.carries_gradient}

    def role(path: str) -> str:
        if path in looked_up:
            return "embedding"
        if path not in before:
            return "other"
        if path not in ahead and path in reaching:
            return "head"
        return "hidden" if before[path] else "first"

    return Roles({path: role(path) for path in traced.leaves}, layout_of(traced))
