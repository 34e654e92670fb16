"""Which leaf got what and why: the layout of a model, and a table of it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.layers.finder import trace
from dsbp_jax.layers.sites import Site
from dsbp_jax.layers.views import Layout, MatrixView, guess_view

_FLOAT_BYTES = 4  # an EigenBasis is float32


def layout(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layout:
    """Reads off a model how each of its parameter leaves is a matrix.

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
    """
    sites = trace(fn, params, args, kwargs).sites
    return Layout(tuple((site.name, site.view) for site in sites))


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What `explain` found out about one use of a leaf.

    Attributes:
      name: The canonical path, with `#1`, … for further uses.
      shape: The shape of the leaf.
      reason: Why the leaf is left alone, wholly or by the sketched gradient;
        other uses of the leaf are named, too.
      view: Its matrix view, or None where the leaf is left alone.
      use: What the model does with it, such as `"dense, 128 rows"`.
      rank: Columns of its basis, at most its dimension.
      state_bytes: Bytes of an `EigenBasis` of the inputs and of the outputs.
      flops_saved: The share of the weight gradient's products that a sketch of
        `rank` columns on the input side saves; not positive where it is not
        worth it.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    view: MatrixView | None = None
    use: str = ""
    rank: int | None = None
    state_bytes: tuple[int, int] | None = None
    flops_saved: float | None = None


@dataclasses.dataclass(frozen=True)
class Explanation(Mapping[str, LeafReport]):
    """A report per leaf and use; prints as a table.

    Attributes:
      reports: In the order of the parameters.
    """

    reports: tuple[LeafReport, ...]

    def __getitem__(self, name: str) -> LeafReport:
        """The report on the use `name`."""
        for report in self.reports:
            if report.name == name:
                return report
        raise KeyError(name)

    def __iter__(self) -> Any:
        """Iterates over the names."""
        return (report.name for report in self.reports)

    def __len__(self) -> int:
        """The number of reports."""
        return len(self.reports)

    def __str__(self) -> str:
        """The table."""
        header = (
            *("leaf", "shape", "matrix", "batch", "use", "rank"),
            *("bytes in", "bytes out", "FLOPs saved", "note"),
        )
        table = _align([header, *map(_cells, self.reports)])
        matched = sum(report.view is not None for report in self.reports)
        alone = [r for r in self.reports if r.view is None and len(r.shape) > 1]
        summary = [f"uses of a leaf as a layer: {matched}"]
        if alone:
            names = ", ".join(report.name for report in alone)
            summary.append(f"left alone though of two or more axes: {names}")
        return "\n".join([*table, "; ".join(summary)])

    __repr__ = __str__


def explain(
    fn: Callable[..., Any], params: Any, *args: Any, rank: int = 64, **kwargs: Any
) -> Explanation:
    """Says of every parameter leaf how it is a matrix, or why it is none.

    Nothing is computed; `jax.ShapeDtypeStruct`s will do. The share of FLOPs
    saved compares `n·d_in·q + n·q·d_out + q·d_in·d_out` with `n·d_in·d_out`, the
    products of a weight gradient sketched with `q = rank` columns and of the
    plain one, for `n` rows.

    Args:
      fn: A function `fn(params, *args, **kwargs)` that returns any pytree.
      params: Its parameters.
      *args: Its other arguments.
      rank: Columns of each basis.
      **kwargs: Further arguments of `fn`.

    Returns:
      A mapping from canonical path (`path#1`, … for further uses) to
      `LeafReport` that prints as a table.

    Raises:
      ValueError: `rank` is no positive integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> params = {"kernel": jnp.ones((96, 80)), "bias": jnp.zeros(80)}
      >>> print(explain(model, params, jnp.ones((500, 96)), rank=8))
      leaf    shape  matrix         batch  use              rank  bytes in ...
      bias    80     -              -      -                -     -        ...
      kernel  96×80  96→80 (0)→(1)  -      dense, 500 rows  8     3108     ...
      uses of a leaf as a layer: 1
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    traced = trace(fn, params, args, kwargs)
    reports: list[LeafReport] = []
    for path, leaf in traced.leaves.items():
        sites = [site for site in traced.sites if site.path == path]
        reasons = [use.reason for use in traced.uses if use.path == path]
        if sites:
            reports += [_matched(site, rank, reasons) for site in sites]
        else:
            reason = _alone(leaf, reasons)
            reports.append(LeafReport(path, leaf.shape, reason))
    return Explanation(tuple(reports))


def sketch_flops(site: Site, rank: int) -> tuple[int, int]:
    """Multiply-adds of a site's weight gradient.

    Args:
      site: The site.
      rank: Columns `q` of the sketch.

    Returns:
      Those of the plain gradient, and of one sketched on the input side.
    """
    batch, taps, d_in, d_out = _sizes(site)
    n_in, n_out = (
        operand.num_rows * site.repeats for operand in (site.inputs, site.outputs)
    )
    plain = n_out * taps * d_in * d_out
    sketched = n_in * d_in * rank + taps * rank * d_out * (n_out + d_in)
    return batch * plain, batch * sketched


def _sizes(site: Site) -> tuple[int, int, int, int]:
    *batch, taps, d_in, d_out = site.view.matrix_shape(site.shape)
    return math.prod(batch), taps, d_in, d_out


def _matched(site: Site, rank: int, other_uses: Iterable[str]) -> LeafReport:
    batch, _, d_in, d_out = _sizes(site)
    plain, sketched = sketch_flops(site, rank)
    saved = 1 - sketched / plain if plain else 0.0
    rows = site.outputs.num_rows * site.repeats
    use = [f"{site.kind}, {rows} rows"]
    if site.lengths:
        use.append(f"in loops of {'×'.join(map(str, site.lengths))}")
    if site.conditional:
        use.append("in a branch")
    reasons = []
    if site.rule:
        reasons.append(f"plain gradient: inside {site.rule}, whose rule stays whole")
    elif site.weight.frozen:
        reasons.append("no gradient: behind stop_gradient")
    elif site.name != site.path:
        reasons.append("plain gradient: a further use of the leaf")
    elif rank >= d_in:
        reasons.append(f"plain gradient: rank {rank} is not below d_in {d_in}")
    elif saved <= 0:
        reasons.append("plain gradient: a sketch would cost more")
    reasons += [f"also {reason}" for reason in other_uses]
    state_bytes = [
        batch * (d * min(rank, d) + min(rank, d) + 1) * _FLOAT_BYTES
        for d in (d_in, d_out)
    ]
    return LeafReport(
        site.name,
        site.shape,
        "; ".join(reasons),
        site.view,
        ", ".join(use),
        rank,
        (state_bytes[0], state_bytes[1]),
        saved,
    )


def _alone(leaf: jax.ShapeDtypeStruct, reasons: Sequence[str]) -> str:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{leaf.dtype} is no floating type"
    reason = "; ".join(reasons) or "not used by the function"
    guess = guess_view(leaf.shape)
    if guess is None:
        return f"no matrix; {reason}"
    axes = f"{_axes(guess.input_axes)}→{_axes(guess.output_axes)}"
    return f"{reason} (a guess without layout would be {axes})"


def _axes(axes: tuple[int, ...]) -> str:
    return f"({','.join(map(str, axes))})"


def _cells(report: LeafReport) -> tuple[str, ...]:
    """One line of the table."""
    shape = "×".join(map(str, report.shape)) or "scalar"
    if report.view is None or report.state_bytes is None:
        return (report.name, shape, *["-"] * 7, report.reason)
    view = report.view
    *_, taps, d_in, d_out = view.matrix_shape(report.shape)
    window = f"{taps} × " if taps > 1 else ""
    axes = f"{_axes(view.input_axes)}→{_axes(view.output_axes)}"
    return (
        report.name,
        shape,
        f"{window}{d_in}→{d_out} {axes}",
        _axes(view.batch_axes) if view.batch_axes else "-",
        report.use,
        str(report.rank),
        *(str(size) for size in report.state_bytes),
        f"{max(0.0, report.flops_saved or 0.0):.0%}",
        report.reason,
    )


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
