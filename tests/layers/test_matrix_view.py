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


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (((0,), (0,)), r"axis must be named once, got input_axes=\(0,\), output_axes="),
        (((1, 1), (0,)), r"each axis must be named once, got input_axes=\(1, 1\)"),
        (((0,), (1,), (1,)), r"each axis must be named once.*batch_axes=\(1,\)$"),
        (((-1,), (0,)), r"input_axes must be .* of ints of at least 0, got \(-1,\)"),
        (((0,), (-1,)), r"output_axes must be .* got \(-1,\)"),
        (
            ((0,), (1,), (1.0,)),
            r"batch_axes must be a tuple of ints of at least 0, got \(1.0,\)",
        ),
        (((0,), (True,)), r"output_axes must be .* got \(True,\)"),
        (
            ((), (0,)),
            r"input_axes must be a non-empty tuple of ints of at least 0, got \(\)",
        ),
        (
            ((0,), ()),
            r"output_axes must be a non-empty tuple of ints of at least 0, got \(\)",
        ),
        (
            (0, (1,)),
            r"input_axes must be a non-empty tuple of ints of at least 0, got 0",
        ),
        (
            ([0], (1,)),
            r"input_axes must be a non-empty tuple of ints of at least 0, got \[0\]",
        ),
    ],
)
def test_axes_are_distinct_and_not_negative(axes, message):
    with pytest.raises(ValueError, match=message):
        MatrixView(*axes)


def test_numpy_axes_are_the_same_axes():
    view = MatrixView((np.int64(1),), (np.int32(0),))
    assert view == MatrixView((1,), (0,))
    assert view.matrix_shape((2, 3)) == (1, 3, 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda view: view.matrix_shape((4, 3)),
        lambda view: view.to_matrix(np.zeros((4, 3))),
        lambda view: view.from_matrix(np.zeros((1, 4, 3)), (4, 3)),
    ],
)
def test_views_name_a_leaf_that_has_too_few_axes(use):
    view = MatrixView((1,), (2,), (0,))
    message = r"shape \(4, 3\) must have at least 3 axes .* MatrixView\(input_axes=\(1,"
    with pytest.raises(ValueError, match=message):
        use(view)


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
