"""The uses of a leaf: which one is the layer, and what the others are called.

The layer is the first use that a gradient flows back to; a pass of a target network,
or one whose answer meets a `stop_gradient`, comes after it whatever the order in which
the model runs. The products of a power iteration (as in spectral normalisation, which
estimates the kernel's norm by it) are no layers: what they meet is no activation.
"""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from dsbp_jax.layers import dataflow, primitives
from dsbp_jax.layers.paths import use_name
from dsbp_jax.layers.sites import Site

_POWER_ITERATION = "multiplied with a vector of its own power iteration"


class Use(NamedTuple):
    """A use of a leaf that is no site, and why."""

    path: str
    reason: str


class Lookup(NamedTuple):
    """An equation that looks up rows of a leaf."""

    path: str
    key: dataflow.Key


class Scaling(NamedTuple):
    """An equation that multiplies or divides a leaf entry by entry."""

    path: str
    key: dataflow.Key


def settle(
    body: primitives.Body,
    sites: Sequence[Site],
    scalings: Iterable[Scaling],
    leaves: Container[str],
) -> tuple[list[Site], list[Use]]:
    """Names the sites of a function, of each leaf those with a gradient first.

    Args:
      body: The function.
      sites: What looks like a site, in program order.
      scalings: Where a leaf is scaled.
      leaves: The paths of all leaves.

    Returns:
      The sites, in program order but for further uses without a gradient, which come
      last; and what turned out to be none.

    Raises:
      ValueError: A further use would have the name of another leaf.
    """
    power = _power_iterations(body, sites, list(scalings))
    reached = dataflow.carrying(body, sites)
    kept = [
        dataclasses.replace(site, carries_gradient=site.key in reached)
        for number, site in enumerate(sites)
        if number not in power
    ]
    names = [""] * len(kept)
    counts = dict.fromkeys((site.path for site in kept), 0)
    order = sorted(range(len(kept)), key=lambda n: not kept[n].has_gradient)  # stable
    for number in order:
        site = kept[number]
        name = use_name(site.path, counts[site.path])
        if counts[site.path] and name in leaves:
            raise ValueError(
                f"{name!r} is the path of a leaf and the name of a further use of "
                f"{site.path!r}; give the leaf another name in params"
            )
        counts[site.path] += 1
        names[number] = name
    named = [
        dataclasses.replace(site, name=name)
        for site, name in zip(kept, names, strict=True)
    ]
    named.sort(key=lambda site: not site.has_gradient and site.name != site.path)
    none = dict.fromkeys(Use(sites[n].path, _POWER_ITERATION) for n in sorted(power))
    return named, list(none)


def _power_iterations(
    body: primitives.Body, sites: Sequence[Site], scalings: Sequence[Scaling]
) -> set[int]:
    """The sites (by number) that are steps of a power iteration on their own leaf.

    Each meets a single vector, and either that vector came, through `stop_gradient`,
    from a product of the leaf in the other orientation; or the leaf is scaled by what
    comes of the answer; or the answer goes on into such a product.
    """
    vectors = [n for n, site in enumerate(sites) if site.inputs.num_rows == 1]
    if not vectors:
        return set()
    keys = [sites[n].key for n in vectors] + [scaling.key for scaling in scalings]
    met = dataflow.meetings(body, sites, keys)

    def comes_back(n: int) -> bool:
        origins = met[sites[n].key]
        behind = origins.stopped & ~origins.free
        return any(
            behind >> other & 1
            and sites[other].path == sites[n].path
            and sites[other].view != sites[n].view
            for other in vectors
        )

    def reaches(n: int, path: str, key: dataflow.Key) -> bool:
        origins = met[key]
        return path == sites[n].path and bool((origins.free | origins.stopped) >> n & 1)

    found = {n for n in vectors if comes_back(n)}
    found |= {n for n in vectors for s in scalings if reaches(n, s.path, s.key)}
    last = [sites[n] for n in found]
    return found | {n for n in vectors for s in last if reaches(n, s.path, s.key)}
