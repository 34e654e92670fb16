"""Where a sketched weight gradient pays: the arithmetic and the rules.

Of a layer with n rows, the weight gradient `XᵀΔ` takes `n·d_in·d_out` multiply-adds;
through a basis of q columns on the input side, `B((XB)ᵀΔ)`, it takes
`n·d_in·q + n·q·d_out + q·d_in·d_out`.
"""

import math

from dsbp_jax.layers import Site, Trace


def sketch_flops(site: Site, rank: int) -> tuple[int, int]:
    """Multiply-adds of a site's weight gradient.

    Args:
      site: The site.
      rank: Columns `q` of the sketch.

    Returns:
      Those of the plain gradient, and of one sketched on the input side.
    """
    *batch, taps, d_in, d_out = site.view.matrix_shape(site.shape)
    n_in, n_out = (
        operand.num_rows * site.repeats for operand in (site.inputs, site.outputs)
    )
    plain = n_out * taps * d_in * d_out
    sketched = n_in * d_in * rank + taps * rank * d_out * (n_out + d_in)
    return math.prod(batch) * plain, math.prod(batch) * sketched


def why_plain(site: Site, rank: int) -> str:
    """Why the weight gradient of a site is not sketched; empty where it is.

    Args:
      site: The site.
      rank: Columns of the sketch.

    Returns:
      A reason in a few words, or an empty string.
    """
    d_in = site.view.matrix_shape(site.shape)[-2]
    if site.rule:
        return f"inside {site.rule}"
    if site.weight.frozen:
        return "no gradient"
    if site.fused:
        return "part of a fused kernel"
    if site.name != site.path:
        return "further use"
    if rank >= d_in:
        return f"rank {rank} ≥ d_in {d_in}"
    plain, sketched = sketch_flops(site, rank)
    return "would cost more" if sketched >= plain else ""


def sketched_sites(trace: Trace, rank: int) -> dict[str, Site]:
    """The sites whose weight gradient is cheaper through a sketch.

    Args:
      trace: A traced model function.
      rank: Columns of the sketch.

    Returns:
      A dict from canonical path to site; of each leaf the first use only.
    """
    return {site.path: site for site in trace.sites if not why_plain(site, rank)}
