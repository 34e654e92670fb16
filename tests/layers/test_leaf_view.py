"""Views of a leaf against an array of its indices, rearranged alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from dsbp_jax.layers.leaf_view import (
    Digit,
    enter_shared,
    enter_stacked,
    follow,
    in_order,
    join,
    leave,
    unflip,
    whole,
)
from dsbp_jax.layers.matrix_view import MatrixView
from tests.layers.models import normal
from tests.layers.traces import equation_of, find

pytestmark = pytest.mark.usefixtures("strict_promotion")

X = normal(5, 4)


def number(digits, index):
    """The number that digits of the indices along a leaf's axes make."""
    total = np.zeros(index[0].shape, int)
    for axis, stride, size, flipped in digits:
        digit = index[axis] // stride % size
        total = total * size + (size - 1 - digit if flipped else digit)
    return total


def assert_is_block(view, leaf, rearranged):
    """Every entry of the leaf is where the view says, and the shape is as it says."""
    assert view.sizes == rearranged.shape
    index = np.indices(leaf.shape)
    place = [number(digits, index) for digits in view.axes]
    for span in view.spans:
        place[span.axis] += span.start
    np.testing.assert_array_equal(rearranged[tuple(place)], leaf)


def follow_all(fn, view, *shapes):
    """The view of the first operand after each equation of a function."""
    jaxpr = jax.make_jaxpr(fn)(*map(jnp.zeros, shapes)).jaxpr
    at = {jaxpr.invars[0]: view}
    for equation in jaxpr.eqns:
        for operand, atom in enumerate(equation.invars):
            if atom in at:
                step = join if len(equation.invars) > 1 else follow
                at[equation.outvars[0]] = step(equation, at[atom], operand)
    return at[jaxpr.outvars[0]]


# One leaf, rearranged


@st.composite
def layouts(draw):
    """A shape of powers of two, and operations that change the layout of an array."""
    size = st.sampled_from([1, 2, 4])
    shape = draw(st.lists(size, min_size=1, max_size=3))
    steps, now = [], list(shape)
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["transpose", "rev", "reshape", "expand"]))
        axes = draw(st.permutations(range(len(now))))
        if kind == "transpose":
            now = [now[axis] for axis in axes]
        elif kind == "rev":
            axes = axes[: draw(st.integers(0, len(now)))]
        elif kind == "expand":
            axes = [draw(st.integers(0, len(now)))]
            now.insert(axes[0], 1)
        else:
            total = int(np.prod(now))
            now = []
            while total > 1:
                now.append(draw(st.sampled_from([2, 4][: 1 + (total % 4 == 0)])))
                total //= now[-1]
            now.insert(draw(st.integers(0, len(now))), 1)
            axes = now.copy()
        steps.append((kind, tuple(axes)))
    return tuple(shape), steps


LAX = {
    "transpose": lax.transpose,
    "rev": lax.rev,
    "reshape": lax.reshape,
    "expand": lax.expand_dims,
}
NUMPY = {
    "transpose": np.transpose,
    "rev": np.flip,
    "reshape": np.reshape,
    "expand": np.expand_dims,
}


def run(functions, steps, array):
    for kind, axes in steps:
        array = functions[kind](array, axes)
    return array


@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(layouts())
def test_a_leaf_is_followed_through_any_layout(problem):
    shape, steps = problem
    leaf = np.arange(np.prod(shape)).reshape(shape)
    view = follow_all(lambda w: run(LAX, steps, w), whole(0, shape), shape)
    assert_is_block(view, leaf, run(NUMPY, steps, leaf))


def test_digits_of_any_radix():
    """Heads of an axis of six, taken apart and moved."""
    leaf = np.arange(36).reshape(6, 1, 6)

    def change(w):
        return lax.transpose(lax.reshape(lax.squeeze(w, (1,)), (2, 3, 6)), (1, 2, 0))

    view = follow_all(change, whole(0, leaf.shape), leaf.shape)
    assert view.axes == ((Digit(0, 1, 3),), (Digit(2, 1, 6),), (Digit(0, 3, 2),))
    assert_is_block(view, leaf, leaf.reshape(2, 3, 6).transpose(1, 2, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: lax.reshape(w, (3, 2)),  # halves a digit of size three
        lambda w: lax.broadcast_in_dim(w, (2, 2, 3), (1, 2)),
        lambda w: lax.convert_element_type(w, jnp.int32),
        lambda w: lax.slice(w, (0, 0), (2, 2)),
        jnp.sin,
    ],
)
def test_more_than_a_layout(change):
    turned = lambda w: change(lax.transpose(w, (1, 0)))
    assert follow_all(turned, whole(0, (3, 2)), (3, 2)) is None


def test_only_a_stopped_gradient_freezes():
    view = whole(0, X.shape)
    assert follow_all(lax.stop_gradient, view, X.shape).frozen
    assert follow_all(lambda w: w.astype(jnp.bfloat16), view, X.shape) == view


@pytest.mark.parametrize(
    ("rearrange", "shape", "view"),
    [
        (lambda w: w, (4, 3), MatrixView((0,), (1,))),
        (lambda w: w.T, (3, 4), MatrixView((1,), (0,))),
        (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), (4, 3), ((0,), (1,))),
        (lambda w: w.reshape(4, 6), (4, 2, 3), ((0,), (1, 2))),
        (lambda w: w.transpose(2, 1, 0).reshape(4, 6), (3, 2, 4), ((2,), (0, 1))),
        (lambda w: w.reshape(2, 2, 3).reshape(4, 3), (4, 3), ((0,), (1,))),
        (lambda w: w[None, :, None, :].squeeze((0, 2)), (4, 3), ((0,), (1,))),
        (lambda w: jnp.squeeze(w, 0), (1, 4, 3), ((1,), (2,))),
        (lambda w: w.reshape(4, 1), (4, 1), ((0,), (1,))),
        (lambda w: lax.stop_gradient(w), (4, 3), ((0,), (1,))),
        (lambda w: lax.optimization_barrier((X, w))[1], (4, 3), ((0,), (1,))),
    ],
)
def test_views_follow_layout_operations(rearrange, shape, view):
    sites, uses = find(lambda p, x: jnp.dot(x, rearrange(p)), jnp.zeros(shape), X)
    (site,) = sites.values()
    assert site.view == (view if isinstance(view, MatrixView) else MatrixView(*view))
    assert not uses


def test_a_result_belongs_to_its_own_operand():
    barrier = equation_of(lambda x, w: lax.optimization_barrier((x, w)), X, X)
    assert follow(barrier, whole(0, X.shape), 1) == whole(0, X.shape)
    product = equation_of(jnp.dot, X, X.T)
    assert follow(product, whole(0, X.shape), 1) is None


# One of several leaves


def blocks(np_, flip):
    """Functions that put a leaf `(4, 6)` beside others, in two libraries alike."""
    beside = lambda w, a, b: np_.concatenate([a, w, b], 1)
    return {
        "rows": lambda w, a, b: np_.concatenate([a, w], 0),
        "columns": beside,
        "turned": lambda w, a, b: np_.transpose(beside(w, a, b), (1, 0)),
        "twice": lambda w, a, b: np_.concatenate([a, beside(w, a, b)], 1),
        "stack": lambda w, a, b: np_.stack([a, b, w], 1),
        "flat stack": lambda w, a, b: np_.reshape(np_.stack([a, b, w], 1), (4, 18)),
        "heads": lambda w, a, b: np_.reshape(beside(w, a, b), (2, 2, 9, 2)),
        "reversed": lambda w, a, b: flip(np_.concatenate([a, b, w], 1), (0, 1)),
    }


@pytest.mark.parametrize("name", blocks(np, np.flip))
def test_a_leaf_is_a_block_of_what_it_is_joined_into(name):
    shape = (4, 6)
    leaf = 1 + np.arange(24).reshape(shape)
    rearranged = blocks(np, np.flip)[name](leaf, 0 * leaf, 0 * leaf)
    view = follow_all(blocks(jnp, lax.rev)[name], whole(0, shape), *[shape] * 3)
    assert len(view.spans) == 1
    assert_is_block(view, leaf, rearranged)


def test_a_reshape_that_cuts_blocks_is_not_followed():
    cut = lambda w, a: jnp.reshape(jnp.concatenate([a, w], 1), (4, 3, 4))
    assert follow_all(cut, whole(0, (4, 6)), (4, 6), (4, 6)) is None


def test_what_joins_nothing():
    assert join(equation_of(jnp.add, X, X), whole(0, X.shape), 0) is None
    alone = equation_of(lambda w: lax.concatenate_p.bind(w, dimension=0), X)
    assert join(alone, whole(0, X.shape), 0) == whole(0, X.shape)


# Loops


def test_leaving_a_loop_undoes_entering_it():
    view = whole(0, (3, 4, 5))
    inside = enter_stacked(view)
    assert inside.sizes == (4, 5)
    assert inside.loops == ((Digit(0, 1, 3),),)
    assert leave(inside) == view
    assert leave(enter_shared(inside)) == inside
    assert enter_shared(inside).sizes == (4, 5)


# Digits


def test_in_order_is_the_order_of_storage():
    digits = [Digit(1, 1, 2), Digit(0, 1, 3), Digit(1, 2, 4), Digit(0, 3, 5)]
    index = np.indices((15, 8))
    placed = number(in_order(digits), index)
    np.testing.assert_array_equal(placed, np.arange(120).reshape(15, 8))


def test_unflip_is_its_own_inverse():
    digits = [Digit(0, 1, 2, True), None, Digit(1, 1, 4), Digit(2, 1, 3, True)]
    array = normal(2, 5, 4, 3)
    np.testing.assert_array_equal(unflip(array, digits), np.flip(array, (0, 3)))
    np.testing.assert_array_equal(unflip(unflip(array, digits), digits), array)
