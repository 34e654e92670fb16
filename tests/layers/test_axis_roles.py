"""The roles of a weight's axes, against products written out by name."""

import jax.numpy as jnp
import pytest
from jax import lax

from dsbp_jax.layers import axis_roles
from dsbp_jax.layers.leaf_view import Span, whole
from dsbp_jax.layers.matrix_view import MatrixView
from tests.layers.models import normal
from tests.layers.traces import equation_of, find

pytestmark = pytest.mark.usefixtures("strict_promotion")

X = normal(5, 4)


def axes(operand):
    """The axes of an operand by what they are."""
    of = lambda pairs: [axis for axis, _ in pairs]
    return of(operand.batch), list(operand.rows), of(operand.features)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("weight", "other", "contracted", "batched"),
    [
        ("io", "ni", "i", ""),
        ("oi", "nmi", "i", ""),
        ("ijo", "injm", "ij", ""),
        ("eio", "nei", "i", "e"),
        ("oeidj", "jdnie", "ij", "ed"),
    ],
)
def test_axes_of_a_matrix_product_by_name(weight, other, contracted, batched, position):
    sizes = dict(zip("ijoedmn", (2, 3, 4, 5, 6, 7, 8), strict=True))
    operands = [other, other]
    operands[position] = weight
    shapes = [[sizes[name] for name in names] for names in operands]
    numbers = tuple(
        tuple(tuple(names.index(name) for name in group) for names in operands)
        for group in (contracted, batched)
    )
    product = lambda left, right: lax.dot_general(left, right, numbers)
    equation = equation_of(product, *map(jnp.zeros, shapes))
    leaf = whole(0, shapes[position])
    roles = axis_roles.dense(equation, leaf, position)
    named = lambda names, of: [of.index(name) for name in names]
    free = lambda names: [n for n in names if n not in contracted + batched]
    assert roles.view(shapes[position], leaf) == MatrixView(
        tuple(sorted(named(contracted, weight))),
        tuple(named(free(weight), weight)),
        tuple(sorted(named(batched, weight))),
    )
    assert axes(roles.inputs) == (
        named(batched, other),
        named(free(other), other),
        named(contracted, other),
    )
    answer = [*batched, *free(operands[0]), *free(operands[1])]
    assert axes(roles.outputs) == (
        named(batched, answer),
        named(free(other), answer),
        named(free(weight), answer),
    )
    assert roles.outputs.shape == tuple(sizes[name] for name in answer)


def convolution(layout=("NHWC", "HWIO", "NHWC"), shape=(3, 2, 4, 5), **options):
    sizes = dict(N=2, H=6, W=7, C=4)
    x = jnp.zeros([sizes[name] for name in layout[0]])
    run = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout, **options
    )
    return equation_of(run, x, jnp.zeros(shape)), whole(0, shape)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (("NHWC", "HWIO", "NHWC"), (3, 2, 4, 5)),
        (("NCHW", "OIHW", "NCHW"), (5, 4, 3, 2)),
        (("HWNC", "IHWO", "NCHW"), (4, 3, 2, 5)),
    ],
)
def test_axes_of_a_convolution_by_name(layout, shape):
    equation, leaf = convolution(layout, shape)
    roles = axis_roles.convolution(equation, leaf, 1)
    lhs, rhs, out = layout
    kernel = MatrixView((rhs.index("I"),), (rhs.index("O"),))
    assert roles.view(shape, leaf) == kernel
    for operand, names in ((roles.inputs, lhs), (roles.outputs, out)):
        rows = [names.index(name) for name in "NHW"]
        assert axes(operand) == ([], rows, [names.index("C")])


def test_convolutions_that_are_no_sites():
    equation, leaf = convolution()
    assert "no parameter" in axis_roles.convolution(equation, leaf, 0)
    equation, leaf = convolution(shape=(3, 2, 4, 6), batch_group_count=2)
    assert "batch groups" in axis_roles.convolution(equation, leaf, 1)


def test_some_taps_of_a_kernel_that_was_joined():
    equation, _ = convolution()
    part = lambda shape, span: axis_roles.convolution(equation, leaf_of(shape, span), 1)
    assert "some taps" in part((1, 2, 4, 5), Span(0, 1, 1, 3))
    roles = part((3, 2, 3, 5), Span(2, 1, 3, 4))
    assert roles.inputs.spans == (Span(3, 1, 3, 4),)  # of the input's channels
    assert roles.outputs.spans == ()


def leaf_of(shape, span):
    """A leaf that is a block of a kernel."""
    leaf = whole(0, shape)
    return type(leaf)(leaf.leaf, leaf.axes, spans=(span,))


def test_loops_are_batch_axes():
    model = lambda p, x: lax.scan(lambda h, w: (h @ w.T, None), x, p)[0]
    sites, _ = find(model, normal(3, 4, 4), X)
    assert sites[""].view == MatrixView((2,), (1,), (0,))


def test_digits_that_share_an_axis_of_the_leaf():
    def contract_half(p, x):
        return jnp.einsum("bi,ijk->bjk", x, p.reshape(4, 2, 3))

    sites, uses = find(contract_half, jnp.zeros((8, 3)), X)
    assert not sites
    assert uses[""] == "axis 0 of the leaf is split between several roles"


def grouped(p, x):
    return lax.conv_general_dilated(
        x[:, None, None, :],
        p,
        (1, 1),
        "SAME",
        feature_group_count=4,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (grouped, (1, 3, 1, 4), "grouped or depthwise"),
        (lambda p, x: x @ p, (4,), "a matrix has both"),
        (lambda p, x: jnp.tensordot(x, p, 0), (4, 3), "a matrix has both"),
    ],
)
def test_reasons(model, shape, reason):
    sites, uses = find(model, jnp.ones(shape), X)
    assert not sites
    assert reason in uses[""]
