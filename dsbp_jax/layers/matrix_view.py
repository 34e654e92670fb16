"""Matrix views: how an n-D parameter leaf is a stack of matrices.

A kernel is a matrix only by the way a model contracts it. A `MatrixView` names
the axes: those contracted with the layer's input, those that become the
layer's output, and those that index independent layers (scanned stacks,
experts). What remains are *window* axes, the spatial taps of a convolution:
they share the input and output spaces, so a basis of either acts on each tap
alike (the channel view).
"""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """Which axes of a leaf are contracted, produced, and batched.

    Attributes:
      input_axes: Axes contracted with the layer's input; together `d_in`.
      output_axes: Axes of the layer's response; together `d_out`.
      batch_axes: Axes that index independent matrices, in leading order.

    Raises:
      ValueError: An axis is no int of at least 0 or named twice, or there is no
        input or no output axis. In the methods: the leaf has too few axes.

    Example:
      >>> view = MatrixView(input_axes=(2,), output_axes=(3,))  # HWIO
      >>> view.to_matrix(jnp.zeros((3, 3, 16, 32))).shape
      (9, 16, 32)
    """

    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Validates every field."""
        fields = vars(self)
        for name, axes in fields.items():
            valid = isinstance(axes, tuple) and all(map(_is_axis, axes))
            if not valid or not (axes or name == "batch_axes"):
                kind = "tuple" if name == "batch_axes" else "non-empty tuple"
                raise ValueError(
                    f"{name} must be a {kind} of ints of at least 0, got {axes!r}"
                )
        named = [axis for axes in fields.values() for axis in axes]
        if len(set(named)) < len(named):
            given = ", ".join(f"{name}={axes!r}" for name, axes in fields.items())
            raise ValueError(f"each axis must be named once, got {given}")

    def window_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes that are neither batch, input nor output."""
        named = {*self.batch_axes, *self.input_axes, *self.output_axes}
        return tuple(axis for axis in range(ndim) if axis not in named)

    def permutation(self, ndim: int) -> tuple[int, ...]:
        """The axis order (batch, window, input, output)."""
        return (
            *self.batch_axes,
            *self.window_axes(ndim),
            *self.input_axes,
            *self.output_axes,
        )

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape `(*batch, window, d_in, d_out)` of a leaf of shape `shape`."""
        self._require_fit(shape)
        size = lambda axes: math.prod(shape[axis] for axis in axes)
        return (
            *(shape[axis] for axis in self.batch_axes),
            size(self.window_axes(len(shape))),
            size(self.input_axes),
            size(self.output_axes),
        )

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """A leaf as matrices of shape `(*batch, window, d_in, d_out)`."""
        self._require_fit(leaf.shape)
        matrix = jnp.transpose(leaf, self.permutation(leaf.ndim))
        return matrix.reshape(self.matrix_shape(leaf.shape))

    def from_matrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `to_matrix` for a leaf of shape `shape`."""
        self._require_fit(shape)
        order = self.permutation(len(shape))
        inverse = tuple(order.index(axis) for axis in range(len(shape)))
        return jnp.transpose(
            matrix.reshape(tuple(shape[axis] for axis in order)), inverse
        )

    def _require_fit(self, shape: tuple[int, ...]) -> None:
        last = max(*self.batch_axes, *self.input_axes, *self.output_axes)
        if last >= len(shape):
            raise ValueError(
                f"a leaf of shape {tuple(shape)} must have at least {last + 1} axes "
                f"to be seen as {self}"
            )


def _is_axis(axis: object) -> bool:
    integral = isinstance(axis, numbers.Integral) and not isinstance(axis, bool)
    return integral and axis >= 0  # type: ignore[operator]


def guess_view(shape: tuple[int, ...]) -> MatrixView | None:
    """The view assumed where no layout is given.

    2-D leaves are `(in, out)`, 4-D leaves `(height, width, in, out)`; other
    n-D leaves have batch axes first and the matrix last. Leaves of fewer than
    two axes are no matrices.

    Args:
      shape: The shape of the leaf.

    Returns:
      The view, or None where the leaf is no matrix.

    Example:
      >>> guess_view((6, 128, 64))
      MatrixView(input_axes=(1,), output_axes=(2,), batch_axes=(0,))
    """
    ndim = len(shape)
    if ndim < 2:
        return None
    batch = () if ndim == 4 else tuple(range(ndim - 2))
    return MatrixView((ndim - 2,), (ndim - 1,), batch)
