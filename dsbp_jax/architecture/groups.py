"""Groups: the axes of leaves that can only be cut together, and why others cannot be.

A group is read off the function alone. Its leaves are where the width is stored, its
*sinks* the layers that contract it: there the activations are seen that say how wide
it needs to be, and there the next kernel is repaired.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dsbp_jax.architecture.axis_walk import (
    DERIVATIVE,
    PRODUCTS,
    AxisTrace,
    Key,
    trace_axes,
)
from dsbp_jax.architecture.moments import MAX_DENSE
from dsbp_jax.architecture.values import NONLINEAR, REDUCED
from dsbp_jax.layers import Site, name_of


class Place(NamedTuple):
    """Where a width is stored: the `digit`-th atom of an axis of a leaf."""

    path: str
    axis: int
    digit: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes that can only be cut together.

    Attributes:
      name: The path of the leaf that makes the activations, or of the first.
      size: Their size.
      places: Where it is stored.
      sinks: Names of the layers that contract it.
      repaired: Those of them whose kernel does nothing else.
      rotated: Whether only linear maps stand between: an eigenbasis passes.
      beside: Axes for each entry of which the choice along it may be another one
        (heads, layers of a stack), as places of its first leaf.
      pairs: Where two activations contract it, as queries with keys.
      merged: Whether it is summed over, as by LayerNorm: copies are merged only.
      reason: Why it is left whole though nothing fixes it, or "".
      entries: How many there are of each of `beside`.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    sinks: tuple[str, ...]
    repaired: frozenset[str]
    rotated: bool
    beside: tuple[Place, ...] = ()
    pairs: tuple[Key, ...] = ()
    merged: bool = False
    reason: str = ""
    entries: tuple[int, ...] = ()

    @property
    def how(self) -> str:
        """What is done to it, in a word."""
        if self.merged:
            return "copies merged"
        return "rotated" if self.rotated else "selected"


@dataclasses.dataclass(frozen=True)
class Groups(Mapping[str, Group]):
    """What can be cut; prints as a table, with the reason of each axis that cannot.

    Attributes:
      groups: In the order of the parameters.
      reasons: By path and axis, why an axis keeps its size.
    """

    groups: tuple[Group, ...]
    reasons: Mapping[tuple[str, int], str]
    structure: AxisTrace = dataclasses.field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Group:
        """The group of that name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return (group.name for group in self.groups)

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.groups)

    def __str__(self) -> str:
        """The table."""
        lines = []
        for group in self.groups:
            places = ", ".join(f"{place.path}[{place.axis}]" for place in group.places)
            how = group.reason or group.how
            lines.append(f"{group.name}: {group.size} wide, {how}; {places}")
        alike: dict[str, list[str]] = {}
        for (path, axis), reason in self.reasons.items():
            alike.setdefault(reason, []).append(f"{path}[{axis}]")
        for reason, kept in alike.items():
            lines.append(f"fixed, {reason}: {', '.join(kept)}")
        return "\n".join(lines)

    __repr__ = __str__


def groups(fn: Callable[..., Any], params: Any, *args: Any) -> Groups:
    """Which axes of a model's leaves can be cut together, and why others cannot.

    Args:
      fn: A function `fn(params, *args)`.
      params: All arrays that it needs; arrays or `jax.ShapeDtypeStruct`s, since nothing
        is computed.
      *args: Its other arguments, likewise.

    Returns:
      A mapping from name to `Group` that prints as a table.

    Raises:
      ValueError: The function has side effects.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> print(groups(model, params, jnp.ones((5, 3))))
      up: 8 wide, selected; down[0], up[1]
      fixed, an axis of the output: down[1]
      fixed, an axis of the input: up[0]
    """
    return groups_of(trace_axes(fn, params, args))


def groups_of(structure: AxisTrace) -> Groups:
    """The same, of a function that was traced."""
    axes = structure.axes
    places: dict[int, list[Place]] = {}
    for path, leaf in structure.leaves.items():
        for axis, known in enumerate(leaf):
            for index, atom in enumerate(axes.atoms(known)):
                places.setdefault(axes.find(atom), []).append(Place(path, axis, index))
    free = [atom for atom in places if axes.reason(atom) is None]
    makers, takers = _layers(structure)
    paired = _paired(structure)
    summed = _summed(structure)
    found: list[Group] = []
    beside = {
        atom: structure.beside.get(atom, frozenset()) & set(places) for atom in free
    }
    indices: set[int] = set()
    for atom in reversed(free):  # of two that index each other the slower digit does
        if atom not in indices and (takers.get(atom) or atom in paired):
            indices |= beside[atom]
    reasons: dict[tuple[str, int], str] = {}
    for path, leaf in structure.leaves.items():
        for axis, known in enumerate(leaf):
            said = [axes.reason(atom) for atom in axes.atoms(known)]
            if any(said):
                reasons[path, axis] = next(reason for reason in said if reason)
    names: dict[str, int] = {}
    for atom in free:
        sinks = takers.get(atom, [])
        reason = ""
        use = (
            sinks,
            frozenset(
                site.name for site in sinks if _only_taken(structure, site, atom)
            ),
        )
        repaired = use[1]
        if atom in indices:
            reason = "an index of others' choices (heads, experts)"
        elif atom in paired and (sinks or paired[atom] == () or atom in summed):
            reason = "contracted between activations, and used elsewhere too"
        elif atom in summed and (not summed[atom] or beside[atom] or _tied(*use)):
            reason = "summed over, as by a normalisation, with other axes or kernels"
        elif len(repaired) < len(sinks) and axes.size(atom) > MAX_DENSE:
            reason = f"wider than {MAX_DENSE}, and its kernels are used otherwise too"
        elif not sinks and atom not in paired:
            reason = "met by no product with a leaf"
        marks = axes.marks(atom)
        rotated = (
            not marks & {NONLINEAR, REDUCED}
            and len(repaired) == len(sinks)
            and bool(makers.get(atom))
            and atom not in paired
        )
        name = makers[atom][0].path if atom in makers else places[atom][0].path
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}:{names[name]}"
        own = places[atom][0]
        first = structure.leaves[own.path]
        near = tuple(
            Place(own.path, axis, index)
            for axis, known in enumerate(first)
            for index, other in enumerate(axes.atoms(known))
            if axes.find(other) in beside[atom] and axes.find(other) != atom
        )
        sink_names = tuple(site.name for site in sinks)
        found.append(
            Group(
                name,
                axes.size(atom),
                tuple(places[atom]),
                sink_names,
                repaired,
                rotated,
                near,
                paired.get(atom, ()),
                atom in summed,
                reason,
                tuple(
                    axes.size(axes.atoms(first[place.axis])[place.digit])
                    for place in near
                ),
            )
        )
    return Groups(tuple(found), reasons, structure)


def atom_of(structure: AxisTrace, group: Group) -> int:
    """The atom of a group in another trace of its function."""
    return place_atom(structure, group.places[0])


def place_atom(structure: AxisTrace, place: Place) -> int:
    """The atom that stands at a place."""
    atoms = structure.axes.atoms(structure.leaves[place.path][place.axis])
    return structure.axes.find(atoms[place.digit])


def beside_of(structure: AxisTrace, group: Group) -> list[int]:
    """The atoms that the choice along a group may depend on."""
    return [place_atom(structure, place) for place in group.beside]


def _layers(
    structure: AxisTrace,
) -> tuple[dict[int, list[Site]], dict[int, list[Site]]]:
    """For each atom the layers that make it and those that contract it."""
    axes = structure.axes
    makers: dict[int, list[Site]] = {}
    takers: dict[int, list[Site]] = {}
    for site in structure.traced.sites:
        leaf = structure.leaves[site.path]
        for found, own in (
            (makers, site.view.output_axes),
            (takers, site.view.input_axes),
        ):
            atoms = {axes.find(a) for axis in own for a in axes.atoms(leaf[axis])}
            for atom in atoms:
                found.setdefault(atom, []).append(site)
    return makers, takers


def _paired(structure: AxisTrace) -> dict[int, tuple[Key, ...]]:
    """The atoms that other products than layers contract, and where; () if unclear."""
    axes = structure.axes
    layers = {site.key for site in structure.traced.sites}
    found: dict[int, tuple[Key, ...]] = {}
    unclear: set[int] = set()
    for key, record in structure.records.items():
        name, params = name_of(record.equation), record.equation.params
        if key in layers or DERIVATIVE in key or name not in PRODUCTS:
            continue
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
        else:
            contracted = [params["dimension_numbers"].lhs_spec[1]]
            if params["feature_group_count"] > 1:  # depthwise: nothing ends here
                continue
        plain = name == "dot_general" and not any(
            axes.is_sum(digit)
            for operand in record.operands
            for known in operand.axes
            for digit in axes.digits(known)
        )
        for axis in contracted:
            for atom in map(axes.find, axes.atoms(record.operands[0].axes[axis])):
                found[atom] = (*found.get(atom, ()), key)
                unclear |= set() if plain else {atom}
    return {atom: () if atom in unclear else keys for atom, keys in found.items()}


def _summed(structure: AxisTrace) -> dict[int, bool]:
    """The atoms that are summed over, and whether only by plain sums over them."""
    axes = structure.axes
    found: dict[int, bool] = {}
    for record in structure.records.values():
        name, (operand, *_) = name_of(record.equation), (*record.operands, None)
        if operand is None or name not in ("reduce_sum", "dot_general"):
            continue
        if name == "reduce_sum":
            over = record.equation.params["axes"]
        else:
            over = record.equation.params["dimension_numbers"][0][0]
            other = record.equation.params["dimension_numbers"][0][1]
            over = [
                a
                for a, b in zip(over, other, strict=True)
                if operand.uniform[a] or record.operands[1].uniform[b]
            ]
        for axis in over:
            atoms = [axes.find(atom) for atom in axes.atoms(operand.axes[axis])]
            plain = name == "reduce_sum" and len(atoms) == 1
            for atom in atoms:
                found[atom] = found.get(atom, True) and plain
    return found


def _tied(sinks: list[Site], repaired: frozenset[str]) -> bool:
    return len(repaired) < len(sinks)


def _only_taken(structure: AxisTrace, site: Site, atom: int) -> bool:
    """Whether a layer's kernel does nothing else with an atom than contract it."""
    axes, traced = structure.axes, structure.traced
    if any(use.path == site.path for use in traced.uses):
        return False
    others = [other for other in traced.sites if other.path == site.path]
    if len(others) > 1:
        return False
    leaf = structure.leaves[site.path]
    holding = {
        axis
        for axis, known in enumerate(leaf)
        if atom in map(axes.find, axes.atoms(known))
    }
    return bool(holding & set(site.view.input_axes))
