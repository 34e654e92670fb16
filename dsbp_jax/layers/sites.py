"""Sites: the places where a parameter leaf meets activations.

A `Site` is one matrix product or convolution with a leaf as one operand. It
knows, statically, which axes of its input and response are rows, which are
features in the order of the leaf, and which enclosing loops stack leaf and
rows, so that whatever visits it works on plain `(*batch, n, d)` matrices.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.layers.leaf_view import Digit, LeafView, Span, in_order, unflip
from dsbp_jax.layers.matrix_view import MatrixView

Axes = tuple[tuple[int, tuple[Digit, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """How the input or the response of a site is laid out.

    Attributes:
      shape: Its shape.
      batch: Pairs of an axis and the digits of the leaf that it shares, for
        axes that index independent matrices.
      rows: The axes of batch, space and sequence positions.
      features: Pairs of an axis and the digits of the leaf that it meets (for
        a response: that it comes from).
      spans: The axes of which the leaf meets a part only, as one of several leaves
        that were joined into one kernel.
    """

    shape: tuple[int, ...]
    batch: Axes
    rows: tuple[int, ...]
    features: Axes
    spans: tuple[Span, ...] = ()

    @property
    def num_rows(self) -> int:
        """The number of rows, in one iteration of the enclosing loops."""
        return math.prod(self.shape[axis] for axis in self.rows)

    def to_rows(self, array: jax.Array) -> jax.Array:
        """Rows and features, both in the order of the leaf.

        Args:
          array: The operand, of shape `shape`.

        Returns:
          An array of shape `(*batch, n, d)`, one batch axis per digit.
        """
        batch = [digit for _, digits in self.batch for digit in digits]
        features = [digit for _, digits in self.features for digit in digits]
        array = block(array, self.spans)
        order = [axis for axis, _ in self.batch]
        order += [*self.rows, *(axis for axis, _ in self.features)]
        array = jnp.transpose(array, order)
        array = array.reshape(
            [digit.size for digit in batch]
            + [self.num_rows]
            + [digit.size for digit in features]
        )
        array = unflip(array, [*batch, None, *features])
        order = [batch.index(digit) for digit in in_order(batch)]
        order.append(len(batch))
        order += [len(order) + features.index(digit) for digit in in_order(features)]
        array = jnp.transpose(array, order)
        width = math.prod(digit.size for digit in features)
        return array.reshape(*array.shape[: len(batch) + 1], width)

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """The inverse of `to_rows`, of an operand that the leaf meets all of.

        Args:
          rows: Shape `(*batch, n, d)`, as from there.

        Returns:
          An array of shape `shape`.
        """
        assert not self.spans
        # The transpose of a permutation is its inverse.
        like = jax.ShapeDtypeStruct(self.shape, rows.dtype)
        (array,) = jax.linear_transpose(self.to_rows, like)(rows)
        return array


def block(array: jax.Array, spans: Iterable[Span]) -> jax.Array:
    """The part of an array that some spans leave."""
    for span in spans:
        stop = span.start + span.size
        array = jax.lax.slice_in_dim(array, span.start, stop, axis=span.axis)
    return array


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of a parameter leaf as the weight of a linear map.

    Attributes:
      name: The canonical path, followed by `#1`, `#2`, … for further uses. The
        first is the first use that carries gradient, where there is one.
      path: The canonical path of the leaf.
      key: Where the equation is: its indices down the calls and branches.
      kind: `"dense"` or `"convolution"`.
      view: The matrix view of the leaf.
      shape: The shape of the leaf.
      weight: The leaf as the equation sees it.
      position: Which operand of the equation it is, 0 or 1.
      inputs: Layout of the other operand.
      outputs: Layout of the response.
      lengths: The lengths of the enclosing loops, outermost first. Where
        `weight.loops` has digits the leaf is stacked, else shared.
      conditional: Whether a branch must be taken for the site to run.
      platforms: The platforms whose branch it is in, where that is decided so.
      rule: The derivative rule (`"custom_vjp_call"`, …) the site is inside
        of, or None. Its derivative is the user's, so it must not be replaced.
      precision: That of its equation.
      carries_gradient: Whether a derivative of the function's outputs flows back
        to the response.
    """

    name: str
    path: str
    key: tuple[int, ...]
    kind: str
    view: MatrixView
    shape: tuple[int, ...]
    weight: LeafView
    position: int
    inputs: Operand
    outputs: Operand
    lengths: tuple[int, ...] = ()
    conditional: bool = False
    platforms: tuple[str, ...] = ()
    rule: str | None = None
    precision: Any = None
    carries_gradient: bool = True

    @property
    def has_gradient(self) -> bool:
        """Whether this use gives the leaf a gradient."""
        return self.carries_gradient and not self.weight.frozen

    @property
    def fused(self) -> bool:
        """Whether the leaf is one of several that the equation takes as one kernel."""
        return bool(self.weight.spans)

    @property
    def summed(self) -> tuple[Span, ...]:
        """Of such a leaf, the features of the input that meet it and no other.

        The equation's response is then the sum of what several leaves answer.
        """
        features = [axis for axis, _ in self.inputs.features]
        return tuple(span for span in self.inputs.spans if span.axis in features)

    @property
    def repeats(self) -> int:
        """How many iterations of the enclosing loops share one matrix."""
        loops = zip(self.lengths, self.weight.loops, strict=True)
        return math.prod(length for length, digits in loops if digits is None)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the batch axes of the matrix view."""
        return tuple(self.shape[axis] for axis in self.view.batch_axes)

    def gather(self, stacked: jax.Array) -> jax.Array:
        """What the visits of one site collected, as one stack of matrices.

        Args:
          stacked: Shape `(*lengths, *batch, n, d)`: per iteration what has the
            axes of `Operand.to_rows`.

        Returns:
          An array of shape `(*batch_shape, n * repeats, d)`.
        """
        digits: list[Digit | None] = []
        sizes: list[int] = []
        for length, loop in zip(self.lengths, self.weight.loops, strict=True):
            digits += [None] if loop is None else loop
            sizes += [length] if loop is None else [digit.size for digit in loop]
        looped = list(digits)  # what visits collect has the rest in order already
        local = in_order(digit for _, group in self.inputs.batch for digit in group)
        digits += local
        sizes += [digit.size for digit in local]
        rows, features = stacked.shape[-2:]
        batch = in_order(digit for digit in digits if digit is not None)
        order = [digits.index(digit) for digit in batch]
        order += [axis for axis, digit in enumerate(digits) if digit is None]
        order += [len(digits), len(digits) + 1]
        stacked = unflip(stacked.reshape(*sizes, rows, features), looped)
        array = jnp.transpose(stacked, order)
        return array.reshape(*self.batch_shape, rows * self.repeats, features)

    def scatter(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `gather` for one matrix per batch entry.

        Args:
          matrices: Shape `(*batch_shape, ...)`, such as a basis per matrix.

        Returns:
          Shape `(*lengths, *batch, ...)` without the loops that share the leaf.
        """
        stacked = [loop for loop in self.weight.loops if loop is not None]
        local = in_order(digit for _, group in self.inputs.batch for digit in group)
        wanted = [digit for loop in stacked for digit in loop] + list(local)
        batch = in_order(wanted)
        rest = matrices.shape[len(self.batch_shape) :]
        array = matrices.reshape(*(digit.size for digit in batch), *rest)
        order = [batch.index(digit) for digit in wanted]
        order += range(len(batch), array.ndim)
        array = jnp.transpose(array, order)
        array = unflip(array, [digit for loop in stacked for digit in loop])
        lengths = [math.prod(digit.size for digit in loop) for loop in stacked]
        return array.reshape(*lengths, *(digit.size for digit in local), *rest)
