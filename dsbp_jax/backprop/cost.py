"""Where a sketched weight gradient pays: the arithmetic and the rules.

Of a layer with n rows, the weight gradient `XᵀΔ` takes `n·d_in·d_out` multiply-adds;
through a basis of q columns on the input side, `B((XB)ᵀΔ)`, it takes
`n·d_in·q + n·q·d_out + q·d_in·d_out`. With few rows a step is the traffic of kernels,
gradients and moments instead, of which coordinates have next to none.
"""

import math
from collections.abc import Callable, Container, Mapping

from dsbp_jax.layers import MatrixView, Site, Trace

# Writing a gradient, reading it, and reading and writing a kernel and two moments, in
# multiply-adds for each weight: 8 numbers moved in about 16 each on a CPU, and in
# more on an accelerator.
_UPDATE = 128

# Forming W₀ + VS also writes and reads whole kernels: measured on a CPU, at widths of
# 2048 and 4096, it pays from twice its own multiply-adds.
_SUM = 2

#: Costs of a site: plain, and through so many columns.
Cost = Callable[[Site, int], tuple[int, int]]


def _rows(site: Site) -> tuple[int, int]:
    """Rows of a site's inputs and outputs, over all of its visits."""
    return site.inputs.num_rows * site.repeats, site.outputs.num_rows * site.repeats


def sketch_flops(site: Site, rank: int) -> tuple[int, int]:
    """Multiply-adds of a site's weight gradient.

    Args:
      site: The site.
      rank: Columns `q` of the sketch.

    Returns:
      Those of the plain gradient, and of one sketched on the input side. A further
      use shares the last product, from q rows to d_in, with the first.
    """
    *batch, taps, d_in, d_out = site.view.matrix_shape(site.shape)
    n_in, n_out = _rows(site)
    plain = n_out * taps * d_in * d_out
    last = d_in if site.name == site.path else 0
    sketched = n_in * d_in * rank + taps * rank * d_out * (n_out + last)
    return math.prod(batch) * plain, math.prod(batch) * sketched


def step_cost(site: Site, rank: int) -> tuple[int, int]:
    """What a kernel adds to a step beyond its response and the gradient of its input.

    Args:
      site: The site.
      rank: Columns of V.

    Returns:
      Multiply-adds, and what is moved in terms of them, of a whole kernel, and of one
      held as `W₀ + VS`. The update is that of the leaf's first use.
    """
    *batch, taps, d_in, d_out = site.view.matrix_shape(site.shape)
    n_in, n_out = _rows(site)
    update = _UPDATE if site.name == site.path else 0
    gradient = rank * (n_in * d_in + taps * d_out * n_out)
    whole = (n_out + update) * taps * d_in * d_out
    thin = gradient + min(sum_cost(site, rank)) + update * taps * rank * d_out
    return math.prod(batch) * whole, math.prod(batch) * thin


def sum_cost(site: Site, rank: int) -> tuple[int, int]:
    """What it takes to answer by `W₀ + VS`, where `XV` is there.

    Args:
      site: The site.
      rank: Columns of V.

    Returns:
      Multiply-adds of `xW₀ + (xV)S`, with what the reverse pass adds, and those of
      the sum, with what it moves; for each matrix of a stack.
    """
    *_, taps, d_in, d_out = site.view.matrix_shape(site.shape)
    n_in, n_out = _rows(site)
    apart = rank * (n_in * d_in + 2 * taps * d_out * n_out)
    return apart, _SUM * rank * taps * d_in * d_out


def why_plain(
    site: Site, rank: int, first: Site | None = None, cost: Cost = sketch_flops
) -> str:
    """Why the weight gradient of a site is not sketched; empty where it is.

    A further use goes with the first, if that sees the leaf as the same matrix. Of any
    other the gradient is formed whole, and projected where the first is sketched.

    Args:
      site: The site.
      rank: Columns of the sketch.
      first: The first use of its leaf.
      cost: Of the whole step's, or of the gradient's product alone.

    Returns:
      A reason in a few words, or an empty string.
    """
    d_in = site.view.matrix_shape(site.shape)[-2]
    if site.rule:
        return f"inside {site.rule}"
    if not site.has_gradient:
        return "no gradient"
    if site.fused:
        return "part of a fused kernel"
    if site.name != site.path:
        if (
            first is None
            or first.view != site.view
            or why_plain(first, rank, cost=cost)
        ):
            return "further use"
        return ""
    if rank >= d_in:
        return f"rank {rank} ≥ d_in {d_in}"
    plain, sketched = cost(site, rank)
    return "would cost more" if sketched >= plain else ""


def sketched_sites(
    trace: Trace, rank: int, cost: Cost = sketch_flops
) -> dict[str, Site]:
    """The leaves whose weight gradient is cheaper through a sketch.

    Args:
      trace: A traced model function.
      rank: Columns of the sketch.
      cost: As for `why_plain`.

    Returns:
      A dict from canonical path to the first use of the leaf, which decides.
    """
    return {
        site.path: site
        for site in trace.sites
        if site.name == site.path and not why_plain(site, rank, cost=cost)
    }


def thin_uses(trace: Trace, views: Mapping[str, MatrixView]) -> dict[str, Site]:
    """All uses of some leaves that can run through a sketch of one view each.

    Args:
      trace: A traced model function.
      views: Canonical path to the view that the columns are of.

    Returns:
      A dict from name to site, of a leaf the first use first.
    """
    return {
        site.name: site
        for site in trace.sites
        if site.has_gradient and not site.rule and views.get(site.path) == site.view
    }


def other_uses(trace: Trace, uses: Container[str]) -> set[str]:
    """The paths of leaves that are used elsewhere than in the sites named."""
    elsewhere = {site.path for site in trace.sites if site.name not in uses}
    return elsewhere | {use.path for use in trace.uses}
