import jax
import numpy as np
import pytest

from dsbp_jax.layers import LayerActivations, Layout, MatrixView, guess_view
from tests.layers.models import normal


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((4, 3), MatrixView((1,), (0,))),
        ((3, 3, 4, 5), MatrixView((2,), (3,))),
        ((2, 4, 3, 5), MatrixView((3, 1), (2,), (0,))),
        ((2, 4, 3), MatrixView((1,), (0, 2))),
    ],
)
def test_matrix_view_round_trip(shape, view):
    leaf = normal(*shape)
    matrix = view.to_matrix(leaf)
    assert matrix.shape == view.matrix_shape(shape)
    np.testing.assert_array_equal(view.from_matrix(matrix, shape), leaf)


def test_layout_is_a_hashable_mapping():
    view = MatrixView((0,), (1,))
    layout = Layout((("a", view), ("a#1", guess_view((3, 3, 4, 5)))))
    assert dict(layout)["a"] == view
    assert len({layout, Layout(layout.views)}) == 1
    assert "b" not in layout
    assert guess_view((5,)) is None


def test_missing_side_of_activations():
    captured = LayerActivations(normal(5, 4), None, jax.numpy.int32(5))
    rows, count = captured.rows("input")
    assert rows.shape == (5, 4)
    assert count == 5.0
    with pytest.raises(ValueError, match=r"activations hold no outputs"):
        captured.rows("output")
