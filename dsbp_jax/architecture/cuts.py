"""A cut: the matrices that make leaves smaller, and what goes into the next bias."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace
from dsbp_jax.architecture.groups import Group, atom_of, beside_of, place_atom
from dsbp_jax.architecture.leaf_maps import map_axis
from dsbp_jax.layers import Site, leaves_by_path, map_paths


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one group is cut to `width`.

    Attributes:
      group: The group.
      width: Its new size, r.
      encode: Shape `(*beside, n, r)`: what the leaves are multiplied by.
      decode: By sink, shape `(*beside, n, r)`: what the kernel's own axis is multiplied
        by there, in place of `encode`.
      shifts: By sink, shape `(*beside, n)`: c of `h ≈ h_S M + c`, whose answer goes
        into the bias.
      weights: How many entries each one that is kept stands for in sums, shape `(r,)`;
        None where there are no sums.
    """

    group: Group
    width: int
    encode: np.ndarray
    decode: Mapping[str, np.ndarray]
    shifts: Mapping[str, np.ndarray]
    weights: np.ndarray | None = None


def sizes_of(structure: AxisTrace, cuts: tuple[Cut, ...]) -> dict[int, int]:
    """The sizes of the atoms that are cut, in this trace of the function.

    Raises:
      ValueError: It is that of another function, which ties leaves otherwise.
    """
    found: dict[int, int] = {}
    for cut in cuts:
        for atom in _atoms(structure, cut.group):
            if found.setdefault(atom, cut.width) != cut.width:
                raise ValueError(
                    f"fn ties {cut.group.name!r} to another width than in the function "
                    "that was planned"
                )
    return found


def weights_of(structure: AxisTrace, cuts: tuple[Cut, ...]) -> dict[int, np.ndarray]:
    """By atom, what the entries of merged groups count in sums."""
    return {
        atom: cut.weights
        for cut in cuts
        if cut.weights is not None
        for atom in _atoms(structure, cut.group)
    }


def _atoms(structure: AxisTrace, group: Group) -> set[int]:
    """The atoms of a group's places.

    One in the function that was planned; another function of the same leaves, as a
    network has in training, need not tie all of them together.
    """
    found = set()
    for place in group.places:
        atoms = structure.axes.atoms(structure.leaves[place.path][place.axis])
        if place.digit >= len(atoms) or (
            structure.axes.size(atoms[place.digit]) != group.size
        ):
            raise ValueError(
                f"fn must take axis {place.axis} of {place.path!r} apart as the "
                "function that was planned does"
            )
        found.add(place_atom(structure, place))
    return found


def bias_of(structure: AxisTrace, site: Site) -> tuple[str, float] | None:
    """The leaf that takes what a sink answers to a constant, and its sign."""
    found = structure.biases.get(site.key)
    shared = [other for other in structure.traced.sites if other.key == site.key]
    if found is None or len(shared) > 1 or found[0] not in structure.leaves:
        return None
    if site.kind == "convolution" and _pads(structure, site):
        return None  # what is padded is zero, not the constant
    wanted = sorted(_kept(structure, site))
    own = structure.leaves[found[0]]
    atoms = [structure.axes.find(a) for c in own for a in structure.axes.atoms(c)]
    sums = any(structure.axes.is_sum(c) for c in (*own, *structure.leaves[site.path]))
    if sums or sorted(atoms) != wanted or len(set(atoms)) < len(atoms):
        return None
    return found


def _pads(structure: AxisTrace, site: Site) -> bool:
    params = structure.records[site.key].equation.params
    return any(low > 0 or high > 0 for low, high in params["padding"])


def _kept(structure: AxisTrace, site: Site) -> list[int]:
    """The atoms of a layer's response that its kernel brings, and of its stack."""
    leaf, axes = structure.leaves[site.path], structure.axes
    kept = (*site.view.batch_axes, *site.view.output_axes)
    return [axes.find(atom) for axis in kept for atom in axes.atoms(leaf[axis])]


def apply_cuts(structure: AxisTrace, params: Any, cuts: tuple[Cut, ...]) -> Any:
    """The leaves of a function, cut.

    Args:
      structure: The function.
      params: Its parameters.
      cuts: What to cut.

    Returns:
      Parameters of the same tree, smaller.
    """
    sites = {site.name: site for site in structure.traced.sites}
    leaves, new = leaves_by_path(params), dict[str, np.ndarray]()
    changed = lambda path: new[path] if path in new else _wide(leaves[path])
    for cut in cuts:
        for name, shift in cut.shifts.items():
            site = sites[name]
            found = bias_of(structure, site)
            assert found is not None
            path, sign = found
            add = _answer(structure, site, _wide(leaves[site.path]), cut.group, shift)
            new[path] = changed(path) + sign * _as_leaf(structure, site, path, add)
    done: dict[int, int] = {}
    for cut in cuts:
        atom, beside = atom_of(structure, cut.group), beside_of(structure, cut.group)
        decoded = {sites[name].path: matrix for name, matrix in cut.decode.items()}
        inputs = {sites[name].path: sites[name].view.input_axes for name in cut.decode}
        holding = {(place.path, place.axis) for place in cut.group.places}
        for path in dict.fromkeys(place.path for place in cut.group.places):
            classes = list(structure.leaves[path])
            leaf, own = changed(path), dict(done)
            axes = [axis for other, axis in sorted(holding) if other == path]
            for number, axis in enumerate(axes):
                taken = path in decoded and axis in inputs[path]
                matrix = decoded[path] if taken else cut.encode
                if number:  # the former axis has its new size already
                    classes[axes[number - 1]] = _stand_in(
                        structure, classes[axes[number - 1]], {**done, atom: cut.width}
                    )
                leaf = map_axis(
                    structure, leaf, classes, axis, atom, beside, matrix, own
                )
            new[path] = leaf
        done[atom] = cut.width
    return map_paths(
        lambda path, leaf: jnp.asarray(new[path], leaf.dtype) if path in new else leaf,
        params,
    )


def _stand_in(structure: AxisTrace, axis: int, sizes: Mapping[int, int]) -> int:
    """A class of the size that an axis has once it is cut."""
    return structure.axes.new(structure.axes.resized(axis, sizes))


def _wide(leaf: Any) -> np.ndarray:
    """A leaf on the host, in double precision if it is floating."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return np.asarray(leaf).astype(np.float64)


def _answer(
    structure: AxisTrace,
    site: Site,
    kernel: np.ndarray,
    group: Group,
    shift: np.ndarray,
) -> np.ndarray:
    """What a layer answers to a constant input: its kernel, summed over all inputs.

    Returns:
      Axes are the kernel's atoms, those of the inputs of size one.
    """
    axes, leaf = structure.axes, structure.leaves[site.path]
    atom, beside = atom_of(structure, group), beside_of(structure, group)
    names = [axes.find(a) for known in leaf for a in axes.atoms(known)]
    array = kernel.reshape([axes.size(name) for name in names])
    order = [*beside, atom]
    placed = sorted(range(len(order)), key=lambda i: names.index(order[i]))
    weight = np.transpose(shift, placed)
    weight = weight.reshape([axes.size(n) if n in order else 1 for n in names])
    inputs = [axes.find(a) for x in site.view.input_axes for a in axes.atoms(leaf[x])]
    # Taps of a convolution that pads nothing all see the constant.
    kept = set(_kept(structure, site))
    summed = tuple(i for i, n in enumerate(names) if n in inputs or n not in kept)
    return np.sum(array * weight, axis=summed)


def _as_leaf(
    structure: AxisTrace, site: Site, path: str, answer: np.ndarray
) -> np.ndarray:
    """An answer, laid out as the bias is stored."""
    axes, leaf = structure.axes, structure.leaves[site.path]
    kept = set(_kept(structure, site))
    names = [axes.find(a) for c in leaf for a in axes.atoms(c) if axes.find(a) in kept]
    own = [axes.find(a) for c in structure.leaves[path] for a in axes.atoms(c)]
    array = np.transpose(answer, [names.index(name) for name in own])
    return array.reshape([axes.size(known) for known in structure.leaves[path]])
