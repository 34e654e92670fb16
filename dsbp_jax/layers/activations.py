"""What a layer saw and answered: the rows of its inputs and outputs."""

from typing import NamedTuple

import jax

from dsbp_jax.layers.matrix_view import MatrixView


class LayerActivations(NamedTuple):
    """The rows that met one kernel in one evaluation of a model.

    `n_in` and `n_out` count every batch, spatial and sequence position
    together; they differ for strided convolutions. Rows that were not computed
    (a branch of `lax.cond` not taken) are zero and not counted.

    Attributes:
      inputs: Shape `(*batch, n_in, d_in)`, or None where not asked for.
      outputs: The linear response before any bias, shape `(*batch, n_out,
        d_out)`, or None where not asked for.
      count: Valid rows of `outputs` (of `inputs` where there are no outputs),
        shape `(*batch)`, int32. The same share of the inputs is valid.
      view: How this use sees the leaf as a matrix, or None where that is not
        known; no data, so static to every transformation of JAX.
    """

    inputs: jax.Array | None
    outputs: jax.Array | None
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    view: MatrixView | None = None

    @property
    def known_view(self) -> MatrixView | None:
        """The view, where the rows are of the leaf that it is of.

        Under `jax.vmap` over members of an ensemble the rows have an axis in front that
        the view, of one member, knows nothing of.
        """
        rows = self.inputs if self.outputs is None else self.outputs
        if self.view is None or rows is None:
            return None
        return self.view if len(self.view.batch_axes) == rows.ndim - 2 else None

    def rows(self, side: str) -> tuple[jax.Array, jax.Array]:
        """The rows of one side and how many of them are valid.

        Args:
          side: `"input"` or `"output"`.

        Returns:
          The rows, shape `(*batch, n, d)`, and their count, shape `(*batch)`,
          float32.

        Raises:
          ValueError: That side was not captured.
        """
        rows = self.inputs if side == "input" else self.outputs
        if rows is None:
            raise ValueError(
                f"activations hold no {side}s; capture them with "
                f'which=("{side}s",) or both'
            )
        counted = rows if self.outputs is None else self.outputs
        share = self.count.astype("float32") / counted.shape[-2]
        return rows, share * rows.shape[-2]


_ARRAYS = LayerActivations._fields[:-1]

# A NamedTuple is a pytree of all of its fields unless it is registered.
jax.tree_util.register_pytree_with_keys(
    LayerActivations,
    lambda layer: (
        [(jax.tree_util.GetAttrKey(name), getattr(layer, name)) for name in _ARRAYS],
        layer.view,
    ),
    lambda view, arrays: LayerActivations(*arrays)._replace(view=view),
    lambda layer: (layer[:-1], layer.view),
)
