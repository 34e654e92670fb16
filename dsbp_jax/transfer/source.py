"""What is kept of a source task: its kernels, and the eigenspaces of what they met."""

import json
import os
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax import checks
from dsbp_jax.layers import MatrixView, leaves_by_path
from dsbp_jax.linalg import EigenBasis, grow_basis
from dsbp_jax.tracking import Eigenspace, Spaces, labelled, wide

_LABELS = "labels"
_FORMAT = 1


class Source(NamedTuple):
    """A source task, as `add_spectral_transfer(strength, *source)` takes it.

    Attributes:
      params: Canonical path to kernel, of the leaves that have an eigenspace.
      bases: Canonical path to the eigenspace of the layer's inputs.
    """

    params: dict[str, jax.Array]
    bases: dict[str, Eigenspace]


def save_source(path: str | os.PathLike, params: Any, source_bases: Spaces) -> None:
    """Writes what transfer needs of a source task into one `.npz` file.

    Args:
      path: Of the file.
      params: The params at the end of the source task.
      source_bases: Input-side eigenspaces, as `activation_bases` gives them on source
        data.

    Raises:
      ValueError: The bases do not fit the params.

    Example:
      >>> import pathlib, tempfile
      >>> basis = EigenBasis(jnp.eye(2, 1), jnp.array([4.0]), jnp.array(5.0))
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "source.npz"
      >>> save_source(file, {"kernel": jnp.ones((2, 3))}, {"kernel": basis})
      >>> source = load_source(file)
      >>> source.params["kernel"].shape, source.bases["kernel"].rank
      ((2, 3), 1)
    """
    leaves = leaves_by_path(params)
    found = labelled("source_bases", source_bases, params, need="input")
    arrays: dict[str, Any] = {}
    labels = []
    for index, (name, (space,)) in enumerate(found.items()):
        kernel = leaves[name]
        view = None if space.view is None else vars(space.view)
        dtype = jnp.dtype(kernel.dtype).name
        labels.append(
            {"path": name, "view": view, "source": space.source, "dtype": dtype}
        )
        # Not every dtype of JAX is one of a file.
        parts = (kernel.astype(wide(kernel.dtype)), *space.basis, space.solved)
        arrays |= {f"{index}.{i}": np.asarray(part) for i, part in enumerate(parts)}
    text = json.dumps({"format": _FORMAT, "layers": labels})
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **{_LABELS: np.array(text)}, **arrays)


def load_source(path: str | os.PathLike) -> Source:
    """The inverse of `save_source`.

    Args:
      path: Of the file.

    Returns:
      The source task.

    Raises:
      ValueError: The file is none of a source task.
      OSError: It can't be read.
    """
    params, bases = {}, {}
    try:
        with np.load(path) as file:
            known = json.loads(str(file[_LABELS]))
            if known["format"] != _FORMAT:
                raise ValueError(f"format {known['format']}")
            for index, label in enumerate(known["layers"]):
                kernel, *basis, solved = (
                    jnp.asarray(file[f"{index}.{i}"]) for i in range(5)
                )
                view = label["view"] and MatrixView(
                    **{name: tuple(axes) for name, axes in label["view"].items()}
                )
                params[label["path"]] = kernel.astype(label["dtype"])
                bases[label["path"]] = Eigenspace(
                    EigenBasis(*basis), solved, view, "input", label["source"]
                )
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"path must be a file of save_source, got {str(path)!r} ({error})"
        ) from error
    return Source(params, bases)


def merge_bases(
    bases: dict[str, Eigenspace],
    other: dict[str, Eigenspace],
    *,
    energy: float = 1.0,
) -> dict[str, Eigenspace]:
    """The eigenspaces of two sources in turn: the first, grown by the second.

    Of each layer the first space is kept whole, and the fewest directions of the
    second are added with which the share `energy` of its variance is held. Eigenvalues
    are those of the sum of both covariances: with `energy=1` and no direction left out,
    the transfer penalty is the sum of both.

    Args:
      bases: Canonical path to eigenspace, of the sources so far.
      other: Of the next one; a layer that only one has is taken as it is.
      energy: In (0, 1].

    Returns:
      Path to eigenspace; ranks differ from layer to layer.

    Raises:
      ValueError: Spaces of a layer are of different sides, views or widths, one of
        them was never refreshed, or the energy is out of its range.

    References:
      [P] Saha, Garg and Roy, Gradient projection memory, ICLR 2021.
      METHODS section 7.
    """
    checks.in_unit_interval("energy", energy, open_left=True)
    merged = {**bases, **other}
    for path in bases.keys() & other.keys():
        old, new = bases[path], other[path]
        label = lambda space: (
            space.side,
            space.view,
            space.vectors.shape[:-1],
        )
        if label(old) != label(new):
            raise ValueError(
                f"other must have a space of {label(old)} at {path!r}, as bases, got "
                f"{label(new)}"
            )
        for name, space in (("bases", old), ("other", new)):
            if not jnp.all(space.solved):
                raise ValueError(
                    f"{name} must have been refreshed; at {path!r} it still has the "
                    "random columns of its start"
                )
        grown = grow_basis(old.basis, new.basis, energy)
        merged[path] = Eigenspace(grown, new.solved, old.view, old.side, old.source)
    return merged
