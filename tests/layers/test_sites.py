"""Rows and matrices in the order of the leaf, and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax.layers import capture_activations, layout
from dsbp_jax.layers.leaf_view import Span
from dsbp_jax.layers.sites import block
from tests.layers.models import normal
from tests.layers.traces import find, visits

pytestmark = pytest.mark.usefixtures("strict_promotion")


# One product


def test_features_are_in_the_order_of_the_leaf():
    """Heads first in the leaf, last in the input; the rows keep theirs."""
    model = lambda p, x: jnp.einsum("bdhs,hdk->bsk", x, p)
    seen = visits(model, normal(2, 3, 4), normal(5, 3, 2, 6))[""]
    x = seen.x
    wanted = x.transpose(0, 3, 2, 1).reshape(30, 6)
    np.testing.assert_array_equal(seen.product.site.inputs.to_rows(x), wanted)


EQUATIONS = {
    "dense": (lambda p, x: x @ p, (4, 3), (5, 4)),
    "left operand": (lambda p, x: p @ x, (3, 4), (4, 5)),
    "heads": (lambda p, x: jnp.einsum("bsd,hdk->bhsk", x, p), (2, 4, 3), (5, 6, 4)),
    "reversed": (lambda p, x: x @ p[::-1, ::-1], (4, 3), (5, 4)),
    "experts": (lambda p, x: jnp.einsum("beij,jeki->bek", x, p), (2, 3, 5, 4), None),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_rows_of_the_response_are_rows_of_the_input_times_the_leaf(name):
    model, shape, given = EQUATIONS[name]
    leaf, x = normal(*shape), normal(*(given or (6, 3, 4, 2)), seed=1)
    product, x, _, y = visits(model, leaf, x)[""]
    site = product.site
    matrix = site.view.to_matrix(leaf)[..., 0, :, :]
    wanted = site.inputs.to_rows(x) @ matrix
    np.testing.assert_allclose(site.outputs.to_rows(y), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.shape[-2] == site.inputs.num_rows == site.outputs.num_rows


@pytest.mark.parametrize("stride", [1, 2])
def test_channel_view(stride):
    def model(params, x):
        return lax.conv_general_dilated(
            x,
            params["k"],
            (stride, stride),
            "VALID",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )

    params, x = {"k": normal(5, 3, 2, 2)}, normal(2, 3, 5, 5)
    out, activations = capture_activations(model)(params, x)
    rows = lambda a: jnp.moveaxis(a, 1, -1).reshape(-1, a.shape[1])
    np.testing.assert_array_equal(activations["k"].inputs, rows(x))
    np.testing.assert_array_equal(activations["k"].outputs, rows(out))
    assert activations["k"].count == rows(out).shape[0]
    view = layout(model, params, x)["k"]
    assert (view.input_axes, view.output_axes) == ((1,), (0,))


def test_a_block_is_what_its_spans_leave():
    array = normal(4, 5, 6)
    spans = (Span(0, 1, 2, 4), Span(2, 3, 3, 6))
    np.testing.assert_array_equal(block(array, spans), array[1:3, :, 3:])
    assert block(array, ()) is array


@pytest.mark.parametrize("axis", [0, 1])
def test_leaves_of_one_kernel_meet_their_own_features(axis):
    joint = lambda p: jnp.concatenate([p["a"], p["b"]], axis)
    params = {"a": normal(2, 2), "b": normal(2, 2, seed=1)}
    x = normal(5, 4 if axis == 0 else 2)
    seen = visits(lambda p, x: x @ joint(p), params, x)
    for index, (product, _, _, y) in enumerate(seen.values()):
        site, own = product.site, slice(2 * index, 2 * index + 2)
        assert site.fused
        assert bool(site.summed) == (axis == 0)
        rows = x[:, own] if axis == 0 else x
        np.testing.assert_array_equal(site.inputs.to_rows(x), rows)
        answers = y if axis == 0 else y[:, own]
        np.testing.assert_array_equal(site.outputs.to_rows(y), answers)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_gradient_needs_a_leaf_and_an_answer_that_carry_it(frozen, stopped):
    stop = lambda array, really: lax.stop_gradient(array) if really else array
    model = lambda p, x: jnp.sum(stop(x @ stop(p, frozen), stopped)) + jnp.sum(x)
    sites, _ = find(model, normal(4, 3), normal(5, 4))
    assert sites[""].carries_gradient == (not stopped)
    assert sites[""].has_gradient == (not frozen and not stopped)


# Loops


def test_shared_kernels_have_rows_time_first():
    def model(params, x):
        return lax.scan(lambda h, x: (jnp.tanh(h @ params["w"] + x), h), x[0], x)

    params, x = {"w": normal(3, 3)}, normal(4, 2, 3)
    (_, hidden), activations = capture_activations(model)(params, x)
    np.testing.assert_array_equal(activations["w"].inputs, hidden.reshape(8, 3))
    assert activations["w"].count == 8


def test_stacked_kernels_lead_even_in_reverse():
    def model(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, params["w"], reverse=True)

    params, x = {"w": normal(3, 4, 4)}, normal(2, 4)
    (_, hidden), activations = capture_activations(model)(params, x)
    np.testing.assert_array_equal(activations["w"].inputs, hidden)
    np.testing.assert_array_equal(activations["w"].inputs[-1], x)
    np.testing.assert_array_equal(activations["w"].count, [2, 2, 2])


def stacked(p, x):
    return lax.scan(lambda h, w: (h @ w, None), x, p)[0]


def experts(p, x):
    """Layers of experts, stored as (in, expert, layer, out) and run backwards."""
    each = lambda h, w: jnp.einsum("ebd,deo->ebo", h, w)
    stack = p.transpose(2, 0, 1, 3)[::-1]
    return lax.scan(lambda h, w: (each(h, w), None), jnp.stack([x] * 2), stack)[0]


def shared(p, x):
    """Three layers, each run twice by an inner loop."""
    twice = lambda h, w: lax.scan(lambda h, _: (h @ w, None), h, length=2)[0]
    return lax.scan(lambda h, w: (twice(h, w), None), x, p)[0]


def folded(p, x):
    """Two loops over one axis of the leaf."""
    inner = lambda h, w: lax.scan(lambda h, w: (h @ w, None), h, w)
    return lax.scan(lambda h, w: (inner(h, w)[0], None), x, p.reshape(2, 3, 4, 4))[0]


# The model, the leaf's shape, the site's loops, and the leaf as loops see it.
LOOPS = {
    "stacked": (stacked, (3, 4, 4), lambda p: p),
    "experts": (experts, (4, 2, 3, 4), lambda p: p.transpose(2, 1, 0, 3)[::-1]),
    "shared": (shared, (3, 4, 4), lambda p: p),
    "folded": (folded, (6, 4, 4), lambda p: p.reshape(2, 3, 4, 4)),
}


@pytest.fixture(params=LOOPS)
def looped(request):
    model, shape, slices = LOOPS[request.param]
    leaf = jnp.arange(float(np.prod(shape))).reshape(shape)
    sites, _ = find(model, leaf, normal(5, 4))
    return sites[""], leaf, slices(leaf)


def matrices(site, leaf):
    return site.view.to_matrix(leaf)[..., 0, :, :]


def test_scatter_hands_each_iteration_its_own_matrix(looped):
    site, leaf, slices = looped
    np.testing.assert_array_equal(site.scatter(matrices(site, leaf)), slices)


def test_gather_is_the_inverse_of_scatter(looped):
    site, leaf, _ = looped
    wanted = matrices(site, leaf)
    assert wanted.shape[:-2] == site.batch_shape
    stacked = site.scatter(wanted)
    if site.repeats > 1:  # the iterations that share a matrix, one after the other
        stacked = jnp.stack([stacked] * site.repeats, axis=1)
        wanted = jnp.concatenate([wanted] * site.repeats, axis=-2)
    np.testing.assert_array_equal(site.gather(stacked), wanted)
    assert site.gather(stacked).shape[:-2] == site.batch_shape


def test_repeats_count_the_loops_that_share_a_matrix():
    repeats = {
        name: find(model, jnp.zeros(shape), normal(5, 4))[0][""].repeats
        for name, (model, shape, _) in LOOPS.items()
    }
    assert repeats == {"stacked": 1, "experts": 1, "shared": 2, "folded": 1}
