"""Columns of two sources, orthonormal together, against dense eigenvectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_jax
from dsbp_jax.backprop.columns import Columns, find_layers, outside, vectors
from dsbp_jax.layers import (
    LayerActivations,
    Layout,
    MatrixView,
    capture_activations,
    trace,
)
from dsbp_jax.tracking import empty_state
from tests.backprop.models import Case, mlp, one_layer, sketch_state
from tests.layers.models import normal

KEY = jax.random.key(7)

# A stack of layers, and a leaf that is stored as (out, in).
LAYOUT = Layout({"s": MatrixView((1,), (2,), (0,)), "w": MatrixView((1,), (0,))})
PARAMS = {"s": normal(2, 6, 4), "w": normal(5, 6), "bias": normal(3)}
DECAY = 3.0 * 0.3 ** jnp.arange(6)


def problem(layout=LAYOUT):
    """Inputs and gradients with a spectrum that decays."""
    rows = {"s": normal(2, 9, 6, seed=1) * DECAY, "w": normal(9, 6, seed=2) * DECAY}
    seen = {
        path: LayerActivations(
            rows[path], None, jnp.full(rows[path].shape[:-2], 9, jnp.int32)
        )
        for path in layout
    }
    grads = {**PARAMS, "s": DECAY[::-1, None] * normal(2, 6, 4, seed=3)}
    return seen, grads


# What the columns are


def test_columns_of_a_stack_are_orthonormal_together_and_lead_their_sources():
    columns, stack = Columns(rank=4, tracking=2), Layout({"s": LAYOUT["s"]})
    state = columns.init(PARAMS, stack, KEY)
    (seen, grads), view = problem(stack), stack["s"]
    step = jax.jit(
        lambda state: columns.update(
            state, PARAMS, stack, activations=seen, gradients=grads, refresh=True
        )
    )
    for _ in range(6):
        state = step(state)
    basis = vectors(*state)["s"]
    eye = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    np.testing.assert_allclose(basis.mT @ basis, eye, atol=1e-5)
    rows = seen["s"].inputs
    leading = np.linalg.eigh(rows.mT @ rows)[1][..., -2:]
    assert_same_span(basis[..., :2], leading)
    matrix = view.to_matrix(grads["s"])[..., 0, :, :]
    rest = matrix - leading @ (leading.mT @ matrix)
    assert_same_span(basis[..., 2:], np.linalg.svd(rest)[0][..., :2])


def test_columns_are_orthonormal_where_a_gradient_leaves_nothing_to_follow():
    columns, one = Columns(rank=4, tracking=2), Layout({"w": LAYOUT["w"]})
    state = columns.init(PARAMS, one, KEY)
    seen, _ = problem(one)
    none = jax.tree.map(jnp.zeros_like, PARAMS)
    state = columns.update(
        state, PARAMS, one, activations=seen, gradients=none, refresh=True
    )
    basis = vectors(*state)["w"]
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)


def assert_same_span(one, other):
    cosines = np.linalg.svd(np.asarray(one.mT @ other))[1]
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


@pytest.mark.parametrize("tracking", [0, 1, 4])
def test_a_source_without_columns_tracks_nothing(tracking):
    state = Columns(rank=4, tracking=tracking).init(PARAMS, LAYOUT, KEY)
    ranks = [
        found["w"].shape[-1] if (found := vectors(source)) else 0 for source in state
    ]
    assert ranks == [4 - tracking, tracking]
    assert vectors(*state)["w"].shape == (6, 4)
    assert vectors(*state)["s"].shape == (2, 6, 4)
    assert not vectors(empty_state())


def test_leaves_that_are_not_in_the_layout_now_keep_their_columns():
    columns = Columns(rank=3, tracking=0)
    state = columns.init(PARAMS, LAYOUT, KEY)
    fewer = Layout({"w": LAYOUT["w"]})
    seen, _ = problem(fewer)
    after = columns.update(state, PARAMS, fewer, activations=seen, refresh=True)
    before, after = vectors(*state), vectors(*after)
    np.testing.assert_array_equal(after["s"], before["s"])
    assert not np.allclose(after["w"], before["w"])


# A batch of a loss


def test_measuring_a_batch_is_an_update_by_its_gradient_and_inputs():
    case = one_layer()
    columns = Columns(rank=4, tracking=2)
    traced = trace(case.loss, case.params, (case.x,), {})
    views = find_layers(traced, 4, has_aux=False)
    assert dict(views) == {"w": MatrixView((0,), (1,))}
    state = columns.init(case.params, views, KEY)
    measured = columns.measure(
        traced, state, case.params, views, (case.x,), has_aux=False
    )
    wanted = columns.update(
        state,
        case.params,
        views,
        activations=capture_activations(case.loss)(case.params, case.x)[1],
        gradients=jax.grad(case.loss)(case.params, case.x),
        refresh=True,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        vectors(*measured),
        vectors(*wanted),
    )
    nothing = Layout({})
    empty = columns.init(case.params, nothing, KEY)
    same = columns.measure(
        traced, empty, case.params, nothing, (case.x,), has_aux=False
    )
    assert same is empty


# Steps of a sketch


def test_columns_follow_inputs_and_gradient():
    case = one_layer()
    backprop = dsbp_jax.spectral_backprop(case.loss, 6, tracking=3, refresh_every=None)
    state = jax.jit(backprop.init)(case.params, case.x, key=KEY)
    refresh = jax.jit(backprop.refresh)
    for _ in range(5):
        state = refresh(case.params, state, case.x)
    exact = jax.grad(case.loss)(case.params, case.x)["w"]
    columns = vectors(*state.columns)["w"]
    np.testing.assert_allclose(columns.T @ columns, np.eye(6), atol=1e-5)
    _, leading = np.linalg.eigh(case.x.T @ case.x)
    leading = leading[:, -3:]
    np.testing.assert_allclose(
        np.linalg.norm(leading.T @ columns[:, :3]), 3**0.5, atol=1e-3
    )
    outside = exact - leading @ (leading.T @ exact)
    left = np.linalg.svd(outside)[0][:, :3]
    np.testing.assert_allclose(
        np.linalg.norm(left.T @ columns[:, 3:]), 3**0.5, atol=1e-3
    )


def test_columns_are_refreshed_in_turn():
    case = mlp()
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=4)
    state = jax.jit(backprop.init)(case.params, case.x, key=KEY)
    step = jax.jit(backprop.value_and_grad)
    counts = []
    for _ in range(8):
        _, _, state = step(case.params, state, case.x + 1)
        info = dsbp_jax.diagnostics(state)
        counts.append([int(info[path].refreshes) for path in ("a", "b")])
    steps = np.diff([[1, 1], *counts], axis=0)
    assert steps.sum(0).tolist() == [2, 2]
    assert steps.sum(1).max() == 1
    assert step._cache_size() == 1


def test_rows_of_branches_that_were_not_taken_do_not_count():
    def loss(params, x):
        step = lambda h, i: (
            jax.lax.cond(i == 2, lambda h: jnp.tanh(h @ params["w"]), lambda h: h, h),
            None,
        )
        return jnp.mean(jax.lax.scan(step, x, jnp.arange(4))[0] ** 2)

    case = Case(loss, {"w": normal(12, 12) / 4}, normal(64, 12, seed=1), ("w",))
    backprop = dsbp_jax.spectral_backprop(loss, 3, refresh_every=1)
    state = sketch_state(case, 3)
    _, _, state = jax.jit(backprop.value_and_grad)(case.params, state, case.x)
    trace = dsbp_jax.bases(state)["w"].trace
    np.testing.assert_allclose(trace, jnp.vdot(case.x, case.x) / 64, rtol=1e-4)


# Outside of columns


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (MatrixView((0,), (1,)), (6, 4)),
        (MatrixView((1,), (0,)), (4, 6)),
        (MatrixView((2,), (3,)), (3, 2, 6, 4)),
        (MatrixView((1,), (2,), (0,)), (3, 6, 4)),
    ],
)
def test_outside_is_the_complement_of_the_projection(view, shape):
    gradient = normal(*shape)
    batch = view.matrix_shape(shape)[:-3]
    basis = jnp.linalg.qr(normal(*batch, 6, 6, seed=1))[0]
    inner, rest = basis[..., :2], basis[..., 2:]
    left = outside(gradient, view, inner)
    projector = (rest @ rest.mT)[..., None, :, :]
    wanted = view.from_matrix(projector @ view.to_matrix(gradient), shape)
    np.testing.assert_allclose(left, wanted, atol=1e-5)
    np.testing.assert_allclose(outside(left, view, inner), left, atol=1e-5)
    np.testing.assert_allclose(outside(left, view, rest), 0, atol=1e-5)


def test_outside_of_nothing_is_everything_in_float32():
    gradient, view = normal(6, 4, dtype=jnp.bfloat16), MatrixView((0,), (1,))
    whole = outside(gradient, view, None)
    assert whole.dtype == outside(gradient, view, jnp.eye(6, 2)).dtype == jnp.float32
    np.testing.assert_array_equal(whole, gradient.astype(jnp.float32))
