"""The layout of a model: the matrix view of each of its leaves, read off its use."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dsbp_jax.layers.finder import Trace, trace
from dsbp_jax.layers.matrix_view import MatrixView


@dataclasses.dataclass(frozen=True, init=False)
class Layout(Mapping[str, MatrixView]):
    """The matrix view of every matched leaf; hashable, so it can be static.

    Attributes:
      views: Pairs of canonical path and view, from a mapping or any iterable of
        pairs. A second use of a leaf has its own entry `path#1`, a third `path#2`,
        and so on.

    Raises:
      ValueError: A path is no string or there twice, or a view is no `MatrixView`.

    Example:
      >>> layout = Layout({"kernel": MatrixView((0,), (1,))})
      >>> layout["kernel"].output_axes
      (1,)
      >>> Layout({"kernel": ((0,), (1,))})
      Traceback (most recent call last):
      ...
      ValueError: views must be a mapping or pairs of a path and a MatrixView, got ...
    """

    views: tuple[tuple[str, MatrixView], ...]

    def __init__(
        self,
        views: Mapping[str, MatrixView] | Iterable[tuple[str, MatrixView]] = (),
    ) -> None:
        object.__setattr__(self, "views", _pairs(views))

    def __getitem__(self, path: str) -> MatrixView:
        """The view of the use `path`."""
        for name, view in self.views:
            if name == path:
                return view
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the paths, in the order in which the model uses them."""
        return (name for name, _ in self.views)

    def __len__(self) -> int:
        """The number of uses."""
        return len(self.views)


def layout(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layout:
    """Reads off a model how each of its parameter leaves is a matrix.

    An axis that `jax.vmap` made over several members of an ensemble looks like an
    axis of attention heads where the members share their input: in
    `jax.vmap(lambda w: x @ w)(stack)` the stack of shape `(members, d_in, d_out)`
    is the one matrix from d_in to members times d_out, `MatrixView((1,), (0, 2))`,
    and one basis mixes the members' outputs. Where each member is to have its own,
    say so with a `Layout` (below); activations that fit it come from
    `jax.vmap(capture_activations(member))`.

    Args:
      fn: A function `fn(params, *args, **kwargs)` that returns any pytree.
      params: Its parameters; arrays or `jax.ShapeDtypeStruct`s, since nothing
        is computed.
      *args: Its other arguments, likewise.
      **kwargs: Likewise.

    Returns:
      The matrix view of every use of a leaf as a layer, in the order of use.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: x @ params["kernel"].T + params["bias"]
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(2)}
      >>> layout(model, params, jnp.ones((5, 3)))["kernel"]
      MatrixView(input_axes=(1,), output_axes=(0,), batch_axes=())

      The members of an ensemble, each with spaces of its own:

      >>> members = lambda params, x: jax.vmap(lambda w: x @ w)(params["stack"])
      >>> params, x = {"stack": jnp.ones((4, 3, 2))}, jnp.ones((5, 3))
      >>> found = layout(members, params, x)
      >>> found["stack"]
      MatrixView(input_axes=(1,), output_axes=(0, 2), batch_axes=())
      >>> own = MatrixView(input_axes=(1,), output_axes=(2,), batch_axes=(0,))
      >>> Layout({**found, "stack": own})["stack"].batch_axes
      (0,)
    """
    return layout_of(trace(fn, params, args, kwargs))


def layout_of(traced: Trace) -> Layout:
    """The same, of a function that was traced."""
    return Layout((site.name, site.view) for site in traced.sites)


def _pairs(views: Any) -> tuple[tuple[str, MatrixView], ...]:
    """The views as a tuple of pairs, or a ValueError."""
    accepted = "views must be a mapping or pairs of a path and a MatrixView"
    given = views.items() if isinstance(views, Mapping) else views
    if not isinstance(given, Iterable):
        raise ValueError(f"{accepted}, got {views!r}")
    pairs: dict[str, MatrixView] = {}
    for pair in given:
        items = tuple(pair) if isinstance(pair, Iterable) else ()
        if len(items) != 2:
            raise ValueError(f"{accepted}, got {pair!r} among them")
        path, view = items
        if not isinstance(path, str) or not isinstance(view, MatrixView):
            raise ValueError(f"{accepted}, got {view!r} for {path!r}")
        if path in pairs:
            raise ValueError(f"views must name each path once, got {path!r} twice")
        pairs[path] = view
    return tuple(pairs.items())
