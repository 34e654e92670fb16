"""Thin products: a site's equation with the layer's input behind a basis.

With a basis B of q columns for the features of the input, a linear response
`XW` restricted to the span of B is `(XB)(BᵀW)`: the same equation with q features
in place of d. `Product` runs the equation as it stands, and takes each of these
factors apart, for matrix products and convolutions of any layout.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsbp_jax.layers import primitives
from dsbp_jax.layers.leaf_view import Digit, in_order, unflip
from dsbp_jax.layers.sites import Site, block

_COLUMNS = Digit(-1, 1, 0)  # stands for the columns of the basis; its size is open


@dataclasses.dataclass(frozen=True)
class Product:
    """The equation of one site.

    Operands are those of the equation, input `x` and weight `w`, in the axes that
    it wants them in. A basis has shape `(*batch, d_in, q)`, with the batch axes of
    `Operand.to_rows` and the features in the order of the leaf.

    Attributes:
      site: The site.
      equation: Its equation.
      response: What the equation answered, where it is that of several sites (a
        kernel joined from several leaves) and another of them has run it.
    """

    site: Site
    equation: primitives.Equation
    response: jax.Array | None = None

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The response, all parameters of the equation kept."""
        if self.response is not None:
            return self.response
        values = (w, x) if self.site.position == 0 else (x, w)
        (result,) = primitives.bind(self.equation, values)
        return result

    def summand(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Operands of the equation that leave what the leaf itself answers.

        Args:
          x: The input.
          w: The weight.

        Returns:
          Both, with no other contracted features than those of `site.summed`; other
          leaves' part of the response's own features is left to `Operand.to_rows`.
        """
        if self.site.kind == "convolution":
            contracted = {self._channel_axes()[1]}
        else:
            contracted = {*self._dimensions(self.site.position)[0][0]}
        spans = [span for span in self.site.weight.spans if span.axis in contracted]
        return block(x, self.site.summed), block(w, spans)

    def compress(self, x: jax.Array, basis: jax.Array) -> jax.Array:
        """`XB`: the input with q features in place of its own.

        Args:
          x: The input.
          basis: Shape `(*batch, d_in, q)`.

        Returns:
          The batch axes and rows of x; q comes last in a matrix product, and takes
          the place of the channels in a convolution.
        """
        basis = self._basis_operand(basis.astype(x.dtype))
        if self.site.kind == "convolution":
            axis = self._channel_axes()[0]
            thin = jax.lax.dot_general(
                x, basis, (((axis,), (0,)), ((), ())), precision=self._precision
            )
            return jnp.moveaxis(thin, -1, axis)
        (contract, batch), inner, outer = self._dimensions(1 - self.site.position)
        numbers = ((contract, inner), (batch, outer))
        return jax.lax.dot_general(x, basis, numbers, precision=self._precision)

    def restrict(self, w: jax.Array, basis: jax.Array) -> jax.Array:
        """`BᵀW`: the weight with q features in place of those that it contracts.

        Args:
          w: The weight.
          basis: Shape `(*batch, d_in, q)`.

        Returns:
          A weight that `expand` takes.
        """
        basis = self._basis_operand(basis.astype(w.dtype))
        if self.site.kind == "convolution":
            axis = self._channel_axes()[1]
            thin = jax.lax.dot_general(
                basis, w, (((0,), (axis,)), ((), ())), precision=self._precision
            )
            return jnp.moveaxis(thin, 0, axis)
        (contract, batch), inner, outer = self._dimensions(self.site.position)
        numbers = ((inner, contract), (outer, batch))
        return jax.lax.dot_general(basis, w, numbers, precision=self._precision)

    def operand(self, thin: jax.Array) -> jax.Array:
        """Matrices of q rows in place of d_in, as a weight that `expand` takes.

        Args:
          thin: Shape `(*batch, window, q, d_out)`, the axes of a `MatrixView`
            without those that loops run through.

        Returns:
          The same numbers in the axes of the equation.
        """
        site = self.site
        kept = [digits for _, digits in site.outputs.features]
        if site.kind == "convolution":
            _, channel = self._channel_axes()
            target = list(site.weight.axes)
            target[channel] = (_COLUMNS,)
            out = _flat(kept)
            window = [d for digits in target for d in digits if d not in out]
            window.remove(_COLUMNS)
            batch: list[tuple[Digit, ...]] = []
        else:
            batch, window = [digits for _, digits in site.inputs.batch], []
            target = [*batch, (_COLUMNS,), *kept]
        source = [*in_order(_flat(batch)), *in_order(window), _COLUMNS]
        return _rearrange(thin, [*source, *in_order(_flat(kept))], target)

    def expand(self, compressed: jax.Array, thin: jax.Array) -> jax.Array:
        """The response to `compress(x)` through a thin weight.

        Args:
          compressed: From `compress`.
          thin: From `restrict` or `operand`.

        Returns:
          An array in the shape of the response.
        """
        if self.site.kind == "convolution":
            (result,) = primitives.bind(self.equation, (compressed, thin))
            return result
        leading = tuple(range(len(self.site.inputs.batch)))
        last, first = (compressed.ndim - 1,), (len(leading),)
        pairs = ((compressed, last), (thin, first))
        left, right = pairs if self.site.position == 1 else pairs[::-1]
        return jax.lax.dot_general(
            left[0],
            right[0],
            ((left[1], right[1]), (leading, leading)),
            precision=self._precision,
            preferred_element_type=self.equation.params["preferred_element_type"],
            out_sharding=self.equation.params.get("out_sharding"),
        )

    def sketched(
        self, x: jax.Array, w: jax.Array, basis: jax.Array, thin: jax.Array
    ) -> jax.Array:
        """The response, differentiated by a thin weight in place of the weight.

        The value, and every derivative by x, are those of the equation; what a first
        derivative by w would be is that by `thin`: `(XB)ᵀΔ` instead of `XᵀΔ`, for
        which the reverse pass needs `XB` and not x.

        The rule is a forward one, and binds the equation as it is: so it can be
        differentiated again, and policies of `jax.checkpoint` see the products.

        Args:
          x: The input.
          w: The weight.
          basis: Shape `(*batch, d_in, q)`; a constant to every derivative.
          thin: A weight that `expand` takes. Its value does not matter.

        Returns:
          The response.

        Raises:
          ValueError: The leaf is part of a fused kernel.
        """
        if self.site.fused:  # the rule would drop the other parts' derivatives
            raise ValueError(f"{self.site.name!r} is part of a fused kernel")
        basis = jax.lax.stop_gradient(basis)

        @jax.custom_jvp
        def response(x: Any, w: Any, basis: Any, thin: Any) -> jax.Array:
            return self(x, w)

        def rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            (x, w, basis, _), (dx, _, _, dthin) = primals, tangents
            y, parts = self(x, w), []
            if not _is_zero(dx):
                parts.append(self(dx, w))
            if not _is_zero(dthin):
                part = self.expand(self.compress(x, basis), dthin)
                sharding = primitives.explicit_sharding(y)
                if sharding is not None:  # the thin weight may have another
                    part = jax.sharding.reshard(part, sharding)
                parts.append(part)
            return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

        response.defjvp(rule, symbolic_zeros=True)
        return response(x, w, basis, thin)

    @property
    def _precision(self) -> Any:
        return self.site.precision

    def _channel_axes(self) -> tuple[int, int]:
        """Of a convolution: where input and kernel have the input's channels."""
        inputs, kernel, _ = self.equation.params["dimension_numbers"]
        return inputs[1], kernel[1]

    def _dimensions(self, position: int) -> tuple:
        """Contracted and batch axes of an operand, and those of the basis to match."""
        contracted, batched = self.equation.params["dimension_numbers"]
        contract, batch = contracted[position], batched[position]
        outer = tuple(range(len(batch)))
        inner = tuple(range(len(batch), len(batch) + len(contract)))
        return (contract, batch), inner, outer

    def _basis_operand(self, basis: jax.Array) -> jax.Array:
        """The basis with an axis for each batch and feature axis of the input."""
        batch, features = (
            [digits for _, digits in axes]
            for axes in (self.site.inputs.batch, self.site.inputs.features)
        )
        source = [*in_order(_flat(batch)), *in_order(_flat(features)), _COLUMNS]
        return _rearrange(basis, source, [*batch, *features, (_COLUMNS,)])


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _flat(groups: Iterable[Sequence[Digit]]) -> list[Digit]:
    return [digit for group in groups for digit in group]


def _rearrange(
    array: jax.Array, source: Sequence[Digit], target: Sequence[Sequence[Digit]]
) -> jax.Array:
    """Splits an array into digits in the order of `source`, regroups as `target`."""
    present = [digit for digit in source if digit.size != 1]
    known = math.prod(digit.size for digit in present if digit is not _COLUMNS)
    size = lambda digit: array.size // known if digit is _COLUMNS else digit.size
    split = array.reshape([size(digit) for digit in present])
    split = unflip(split, present)
    order = [
        present.index(digit) for group in target for digit in group if digit.size != 1
    ]
    shape = [math.prod(size(digit) for digit in group) for group in target]
    return jnp.transpose(split, order).reshape(shape)
