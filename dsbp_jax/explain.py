"""Which leaf got what and why: a table of a model, before anything is trained."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.backprop import sketch_flops, step_cost, why_plain
from dsbp_jax.checks import positive_int
from dsbp_jax.layers import MatrixView, Site, guess_view, roles_of, trace

# Per matrix and side a transform holds vectors (d, k), values (k), a trace, and
# three numbers on how the tracking goes, four bytes each.
_NUMBER_BYTES = 4
_NUMBERS_BESIDE = 4


_LEGEND = (
    "with so many columns a sketch saves of the weight gradient's FLOPs "
    "(spectral_backprop), coordinates of all that a kernel costs in a step but its "
    "answer and its input's gradient (spectral_coordinates); projections do not depend "
    "on it"
)


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What `explain` found out about one use of a leaf.

    Attributes:
      name: The canonical path, with `#1`, … for further uses.
      shape: The shape of the leaf.
      reason: Why the leaf is left alone, or which sides a projection leaves
        alone because the rank reaches their dimension (`identity: …`); other
        uses of the leaf are named, too.
      view: Its matrix view, or None where the leaf is left alone.
      use: What the model does with it, such as `"dense, 128 rows"`.
      ranks: Columns of a basis of the inputs and of the outputs, each at most the
        dimension of its side.
      state_bytes: Bytes that a projection of the inputs and of the outputs holds;
        none where it is the identity (a decay keeps a full basis there), nor for
        a further use of a leaf.
      sketch_saving: The share of the weight gradient's products that
        `spectral_backprop` saves, with a sketch of `rank` columns on the input side.
        No transform depends on it.
      no_sketch: Why it saves nothing here, or empty. Where the first use of a leaf
        is sketched, the gradient of any other is at least projected.
      coordinates_saving: The share that `spectral_coordinates` saves of what the
        kernel adds to a step beyond its answer and the gradient of its input: the
        weight gradient, and reading and writing of gradient, kernel and moments.
      no_coordinates: Why the kernel is trained whole there, or empty.
      role: What the leaf is for, as `roles` says it.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    view: MatrixView | None = None
    use: str = ""
    ranks: tuple[int, int] | None = None
    state_bytes: tuple[int, int] | None = None
    sketch_saving: float | None = None
    no_sketch: str = ""
    coordinates_saving: float | None = None
    no_coordinates: str = ""
    role: str = "other"


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
            *("leaf", "shape", "matrix", "batch", "role", "use"),
            *("rank in", "rank out"),
            *("bytes in", "bytes out", "sketch saves", "coordinates save", "note"),
        )
        table = _align([header, *map(_cells, self.reports)])
        matched = sum(report.view is not None for report in self.reports)
        alone = [r for r in self.reports if r.view is None and len(r.shape) > 1]
        summary = [f"uses of a leaf as a layer: {matched}"]
        if alone:
            names = ", ".join(report.name for report in alone)
            summary.append(f"left alone though of two or more axes: {names}")
        lines = [*table, "; ".join(summary)]
        if matched:
            lines.append(_LEGEND)
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    fn: Callable[..., Any], params: Any, *args: Any, rank: int = 64, **kwargs: Any
) -> Explanation:
    """Says of every parameter leaf how it is a matrix, or why it is none.

    Nothing is computed; `jax.ShapeDtypeStruct`s will do. Every leaf that has a
    matrix is projected, on each side whose dimension is above the rank; where the
    rank reaches it the projection is the identity.

    Apart from that, a column says what share of the weight gradient's products
    `spectral_backprop` saves with `q = rank` columns:
    `n·d_in·q + n·q·d_out + q·d_in·d_out` instead of `n·d_in·d_out` for `n` rows. Where
    it would save nothing, or cannot be, the gradient stays exact, and the column says
    why. A further use of a leaf goes with the first: sketched, or formed as it is and
    projected. The next column is for `spectral_coordinates`, which with few rows save
    the traffic of gradients, kernels and moments too; where they would save nothing
    the leaf is trained whole.

    The first use is the first that a gradient flows back to. A use under
    `stop_gradient`, or whose answer only meets what has no derivative, comes after it,
    and the products of a power iteration are none.

    A leaf axis that `jax.vmap` made is shown as an output axis where the members
    share their input, since it cannot be told from an axis of heads; `layout`
    says how to overrule that.

    Args:
      fn: A function `fn(params, *args, **kwargs)` that returns any pytree.
      params: Its parameters.
      *args: Its other arguments.
      rank: Columns of each basis, at most the dimension of its side.
      **kwargs: Further arguments of `fn`.

    Returns:
      A mapping from canonical path (`path#1`, … for further uses) to
      `LeafReport` that prints as a table.

    Raises:
      ValueError: `rank` is no int of at least 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> params = {"kernel": jnp.ones((96, 80)), "bias": jnp.zeros(80)}
      >>> print(explain(model, params, jnp.ones((500, 96)), rank=8))
      leaf    shape  matrix         batch  role   use              rank in  ...
      bias    80     -              -      other  -                -        ...
      kernel  96×80  96→80 (0)→(1)  -      head   dense, 500 rows  8        ...
      uses of a leaf as a layer: 1
      with so many columns a sketch saves of the weight gradient's FLOPs ...
    """
    rank = positive_int("rank", rank)
    traced = trace(fn, params, args, kwargs)
    reports: list[LeafReport] = []
    roles = roles_of(traced)
    for path, leaf in traced.leaves.items():
        sites = [site for site in traced.sites if site.path == path]
        reasons = [use.reason for use in traced.uses if use.path == path]
        if sites:
            found = [_matched(site, rank, reasons, sites[0]) for site in sites]
        else:
            reason = _alone(leaf, reasons)
            found = [LeafReport(path, leaf.shape, reason)]
        reports += [dataclasses.replace(one, role=roles[path]) for one in found]
    return Explanation(tuple(reports))


def _matched(
    site: Site, rank: int, other_uses: Iterable[str], first: Site
) -> LeafReport:
    *stack, _, d_in, d_out = site.view.matrix_shape(site.shape)
    batch = math.prod(stack)
    saved, held = (
        1 - thin / whole if whole else 0.0
        for whole, thin in (sketch_flops(site, rank), step_cost(site, rank))
    )
    rows = site.outputs.num_rows * site.repeats
    use = [f"{site.kind}, {rows} rows"]
    if site.lengths:
        use.append(f"in loops of {'×'.join(map(str, site.lengths))}")
    if site.conditional:
        named = f" for {', '.join(site.platforms)}" if site.platforms else ""
        use.append(f"in a branch{named}")
    dims, further = {"d_in": d_in, "d_out": d_out}, site.name != site.path
    no_sketch = why_plain(site, rank, first)
    reasons = ["further use: transforms go by the first"] if further else []
    if further and site.has_gradient and not why_plain(first, rank):
        how = "projected once formed" if no_sketch else "sketched with the first's"
        reasons.append(f"its gradient is {how}")
    full = [f"{name} {dim}" for name, dim in dims.items() if rank >= dim]
    if full and not further:
        reasons.append(f"identity: rank {rank} ≥ {', '.join(full)}")
    if site.weight.frozen:
        reasons.append("no gradient: behind stop_gradient")
    elif not site.carries_gradient:
        reasons.append("no gradient: its answer only meets stop_gradient, or argmax")
    reasons += [f"also {reason}" for reason in other_uses]
    ranks = min(rank, d_in), min(rank, d_out)
    numbers_in, numbers_out = (
        0 if further or k == d else batch * (d * k + k + _NUMBERS_BESIDE)
        for d, k in zip(dims.values(), ranks, strict=True)
    )
    return LeafReport(
        site.name,
        site.shape,
        "; ".join(reasons),
        site.view,
        ", ".join(use),
        ranks,
        (numbers_in * _NUMBER_BYTES, numbers_out * _NUMBER_BYTES),
        saved,
        no_sketch,
        held,
        why_plain(site, rank, first, step_cost),
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
    if report.view is None or report.ranks is None or report.state_bytes is None:
        return (report.name, shape, "-", "-", report.role, *["-"] * 7, report.reason)
    view = report.view
    saved = lambda share, why: f"0% ({why})" if why else f"{share:.0%}"
    *_, taps, d_in, d_out = view.matrix_shape(report.shape)
    window = f"{taps} × " if taps > 1 else ""
    axes = f"{_axes(view.input_axes)}→{_axes(view.output_axes)}"
    return (
        report.name,
        shape,
        f"{window}{d_in}→{d_out} {axes}",
        _axes(view.batch_axes) if view.batch_axes else "-",
        report.role,
        report.use,
        *(str(number) for number in (*report.ranks, *report.state_bytes)),
        saved(report.sketch_saving, report.no_sketch),
        saved(report.coordinates_saving, report.no_coordinates),
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
