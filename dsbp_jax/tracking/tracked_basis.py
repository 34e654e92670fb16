"""One tracked basis and its label, as optimizer states hold them."""

from typing import NamedTuple

import jax

from dsbp_jax.layers import MatrixView
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.eigenspace import SIDES, Eigenspace


class Label(NamedTuple):
    """What a basis is of; static. In numbers and strings, which msgpack takes.

    Attributes:
      side: `"input"` or `"output"`.
      source: What it follows.
      shape: That of the leaf.
      input_axes: Those of the leaf's `MatrixView`.
      output_axes: Likewise.
      batch_axes: Likewise.
    """

    side: str
    source: str
    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]

    @property
    def view(self) -> MatrixView:
        """How the leaf is a matrix."""
        return MatrixView(self.input_axes, self.output_axes, self.batch_axes)

    @property
    def dims(self) -> dict[str, int]:
        """The dimensions of both sides."""
        return dict(zip(SIDES, self.view.matrix_shape(self.shape)[-2:], strict=True))


class TrackedBasis(NamedTuple):
    """An eigenbasis and how its tracking goes; one per leaf and side.

    A named tuple, so that every library that writes optimizer states to disk takes it;
    its label is part of its type, and no array.

    Attributes:
      basis: The basis carried since the last refresh.
      drift: Mean squared sine of the angles between the last two bases, shape
        `(*batch)`, float32.
      refreshes: Successful refreshes so far, shape `(*batch)`, int32.
      failures: Refreshes refused because their result was not finite or not
        orthonormal, shape `(*batch)`, int32.
      label: Of which leaf's axes and which side it is; static.
    """

    basis: EigenBasis
    drift: jax.Array
    refreshes: jax.Array
    failures: jax.Array
    label: Label | None = None

    @property
    def vectors(self) -> jax.Array:
        """Those of the basis, shape `(*batch, d, k)`, float32."""
        return self.basis.vectors

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a leaf of this shape is the one, or a device's part of its stack."""
        assert self.label is not None
        if len(shape) != len(self.label.shape):
            return False
        batch = tuple(shape[axis] for axis in self.label.batch_axes)
        pairs = enumerate(zip(shape, self.label.shape, strict=True))
        return batch == self.refreshes.shape and all(
            size == known
            for axis, (size, known) in pairs
            if axis not in self.label.batch_axes
        )

    @property
    def space(self) -> Eigenspace:
        """The basis with its label."""
        assert self.label is not None
        label, solved = self.label, self.refreshes > 0
        return Eigenspace(self.basis, solved, label.view, label.side, label.source)


_ARRAYS = TrackedBasis._fields[:-1]
jax.tree_util.register_pytree_with_keys(
    TrackedBasis,
    lambda entry: (
        [(jax.tree_util.GetAttrKey(name), getattr(entry, name)) for name in _ARRAYS],
        entry.label,
    ),
    lambda label, arrays: TrackedBasis(*arrays)._replace(label=label),
)
