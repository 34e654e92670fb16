"""How wide each layer needs to be, and what that is worth, before anything is cut."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dsbp_jax.architecture import selection
from dsbp_jax.architecture.axis_walk import AxisTrace, trace_axes
from dsbp_jax.architecture.collecting import collect
from dsbp_jax.architecture.groups import Group, Groups, atom_of, groups_of
from dsbp_jax.architecture.losses import measure_groups
from dsbp_jax.architecture.measured import Measured
from dsbp_jax.architecture.merging import Merged
from dsbp_jax.architecture.plans import GroupPlan, Plan
from dsbp_jax.architecture.sensitivity import sensitivity
from dsbp_jax.architecture.timing import timed, to_latency
from dsbp_jax.architecture.widths import Curve, share_out
from dsbp_jax.checks import in_unit_interval, positive_int


def plan(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    energy: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    multiple_of: int = 8,
    protect: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
) -> Plan:
    """Says how far each width of a model can be cut, and what that is worth.

    The widths are found by how `fn` uses its parameters (`groups`), and measured by the
    activations on `batches`. Nothing is cut yet.

    Args:
      fn: A function `fn(params, x)`, as it runs at inference: no dropout, running
        averages in `params`.
      params: All arrays that it needs. What it closes over keeps its axes.
      batches: An iterable of x, at least one; arrays or pytrees of arrays whose leading
        axis is the batch. The first should be like the others: what the outputs feel
        and lose is measured on some of its examples, if `fn` takes so few, and where
        outputs are below 1e8 (larger ones stand for masks).
      energy: In (0, 1]: each group keeps the fewest neurons with which at most this
        much of the variance of what its next layers answer is lost, `1 − energy`. At 1
        nothing goes but dead, constant and duplicated neurons, and what is a sum of
        others.
      flops: In (0, 1]: the share of the operations of all products that is kept;
        widths are shared out so that what the outputs lose with each, measured one
        by one, adds up to the least (where that cannot be measured: what the next
        layers lose), and neurons are chosen by what the outputs feel of the next
        layers' answers, where a derivative reaches them.
      latency: In (0, 1]: the share of the time of a pass that is kept, at every size
        in `batch_sizes`, by measuring.
      multiple_of: Widths are rounded up to multiples of this, as hardware likes.
      protect: Names of groups that stay, or other paths of leaves, whose widths stay.
      batch_sizes: Sizes at which both models are timed, compiled alike.

    Returns:
      The plan; `compress` carries it out.

    Raises:
      ValueError: Not exactly one of `energy`, `flops` and `latency` is given, or it is
        outside of (0, 1]; no plan reaches it (the nearest is named); the plan is not
        faster at one of `batch_sizes`; `batches` is empty; `protect` names nothing;
        nothing can be cut; the function has side effects.

    References:
      [O] METHODS section 10.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
      >>> params = {"up": jnp.asarray(np.tile(w, 2)), "down": jnp.ones((8, 2))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 3)), jnp.float32)
      >>> print(plan(fn, params, [x], energy=1.0, multiple_of=1))
      group  width  kept  rank  how       error
      up     8      4     4     selected  0.00e+00
      FLOPs 50.0%, parameters 50.0%
    """
    goals = {"energy": energy, "flops": flops, "latency": latency}
    given = {name: goal for name, goal in goals.items() if goal is not None}
    if len(given) != 1:
        raise ValueError(
            "exactly one of energy, flops and latency must be given, got "
            + (", ".join(given) or "none")
        )
    ((name, goal),) = given.items()
    goal = float(in_unit_interval(name, goal, open_left=True))
    multiple_of = positive_int("multiple_of", multiple_of)
    sizes = [positive_int("batch_sizes", size) for size in batch_sizes]
    if latency is not None and not sizes:
        raise ValueError("latency needs batch_sizes, the sizes to measure at, got none")
    stream = iter(batches)
    try:
        sample = next(stream)
    except StopIteration:
        raise ValueError("batches must hold at least one batch, got none") from None
    trace_of = lambda batch: trace_axes(fn, params, (batch,))
    structure = trace_of(sample)
    found = groups_of(structure)
    chosen, left = _choose(found, protect)
    measurable = [group for group in chosen if not group.merged]
    roots = {}  # a share of energy is each group's own
    if energy is None:
        sinks = [sink for group in measurable for sink in group.sinks]
        roots = sensitivity(trace_of, sinks, params, sample)
    seen = collect(
        structure,
        measurable,
        params,
        itertools.chain([sample], stream),
        trace_of,
        energy,
    )
    spectra = [
        Merged(structure, one, params)
        if one.merged
        else Measured(structure, one, params, seen.pop(one), energy, roots)
        for one in chosen
    ]
    planner = _Planner(structure, spectra, multiple_of, left, sample)
    if energy is None:
        planner.measure(fn, params)
    if name == "latency":
        return to_latency(fn, params, planner, goal, sizes)
    result = planner.at(**{name: goal})
    if sizes:
        result = timed(fn, params, result, sizes, refuse=True)
    return result


def _choose(
    found: Groups, protect: Sequence[str]
) -> tuple[list[Group], dict[str, str]]:
    """The groups to cut, and why the others stay."""
    if isinstance(protect, str):
        raise ValueError(f"protect must be a sequence of paths, got {protect!r}")
    paths = set(found.structure.leaves)
    for name in protect:
        if name not in paths and name not in found:
            raise ValueError(
                f"protect names {name!r}, which is neither a leaf nor a group; groups "
                f"are {', '.join(found) or 'none'}"
            )
    chosen, left = [], {}
    for group in found.groups:
        named = {place.path for place in group.places} - set(found)
        held = {group.name, *named} & set(protect)
        if group.reason:
            left[group.name] = group.reason
        elif held:
            left[group.name] = "protected"
        else:
            chosen.append(group)
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise ValueError(
            "fn has no width that can be cut"
            + (f" ({why})" if why else "")
            + "; dsbp_jax.architecture.groups(fn, params, x) says why, axis by axis"
        )
    return chosen, left


class _Planner:
    """Plans from what was measured, for any goal."""

    def __init__(
        self,
        structure: AxisTrace,
        measured: Sequence[Measured | Merged],
        multiple_of: int,
        left: Mapping[str, str],
        sample: Any,
    ):
        self.structure = structure
        self.measured = measured
        self.left = left
        self.sample = sample
        self.losses_known = False
        self.atoms = [atom_of(structure, one.group) for one in measured]
        self.curves = [
            Curve(one.errors, one.group.size, multiple_of, one.least)
            for one in measured
        ]
        self.whole = structure.flops({}), structure.parameters({})

    def measure(self, fn: Callable[..., Any], params: Any) -> None:
        """Measures what the outputs lose with each width, if they can."""
        self.losses_known = measure_groups(
            fn, params, self.structure, self.measured, self.curves, self.sample
        )

    def flops(self, widths: Sequence[int]) -> float:
        """The share of operations that is kept."""
        sizes = dict(zip(self.atoms, widths, strict=True))
        return self.structure.flops(sizes) / max(self.whole[0], 1)

    def at(self, *, energy: float | None = None, flops: float | None = None) -> Plan:
        """The plan for a goal."""
        if energy is not None:
            widths = [
                curve.rounded(selection.width_of_energy(one.errors, energy, one.exact))
                for one, curve in zip(self.measured, self.curves, strict=True)
            ]
        else:
            assert flops is not None
            widths = share_out(self.curves, self.flops, flops)
        sizes = dict(zip(self.atoms, widths, strict=True))
        share = 0.99 if energy is None else energy
        return Plan(
            tuple(
                GroupPlan(
                    one.group,
                    width,
                    one.rank(share),
                    curve.error(width),
                    curve.loss(width) if self.losses_known else None,
                )
                for one, width, curve in zip(
                    self.measured, widths, self.curves, strict=True
                )
            ),
            self.flops(widths),
            self.structure.parameters(sizes) / max(self.whole[1], 1),
            {},
            self.left,
            tuple(
                one.cut(width)
                for one, width in zip(self.measured, widths, strict=True)
                if width < one.group.size
            ),
            self.structure,
            self.sample,
        )
