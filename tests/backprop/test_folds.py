"""What a fold needs, does, and keeps: by turns, with few rows, in narrow dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.backprop import kernels
from dsbp_jax.backprop.columns import find_layers, vectors
from dsbp_jax.backprop.cost import sketch_flops, step_cost
from dsbp_jax.layers import MatrixView, capture_activations, trace
from tests.backprop.models import CASES, mlp, one_layer, random_frame
from tests.backprop.test_coordinates import shifted
from tests.backprop.test_sketch import KEY, close
from tests.layers.models import normal
from tests.marks import quick

# What a step shows


@pytest.mark.parametrize("name", quick(CASES, ("mlp", "attention", "scanned")))
def test_what_is_observed_is_the_gradient_and_the_inputs(name):
    """Where the gradient comes in factors, their product is it."""
    case = CASES[name]()
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    coords = shifted(coords, frame)
    plain = jax.jit(training.value_and_grad)(coords, frame, case.x)
    *found, seen = jax.jit(lambda *args: training.value_and_grad(*args, observe=True))(
        coords, frame, case.x
    )
    close(found, list(plain), 1e-5)
    params = training.merge(coords, frame)
    wanted = jax.jit(jax.grad(case.loss))(params, case.x)
    _, activations = capture_activations(case.loss)(params, case.x)
    assert set(seen.layers) == set(frame.kernels)
    for path, layer in seen.layers.items():
        rows, gradient = layer.inputs[0].inputs, layer.gradient
        close(rows, activations[path].inputs, 1e-5)
        if layer.outputs is not None:
            matrix = (rows.mT @ layer.outputs)[..., None, :, :]
            gradient = frame.layout[path].from_matrix(matrix, wanted[path].shape)
        close(gradient, wanted[path], 1e-4)


def test_gradients_of_plain_products_come_in_factors():
    for name, factored in {"attention": True, "scanned": True, "tied": False}.items():
        case = CASES[name]()
        training = dsbp_jax.spectral_coordinates(case.loss, 4)
        _, _, seen = jax.eval_shape(
            lambda *args, training=training: training.value_and_grad(
                *args, observe=True
            ),
            *random_frame(case, 4),
            case.x,
        )
        for layer in seen.layers.values():
            assert (layer.outputs is not None) == factored
            assert (layer.gradient is None) == factored


# Folds


@pytest.fixture(scope="module")
def trained():
    """Coordinates away from zero, with Adam's moments, and what their step saw."""
    case, tx = mlp(), optax.adam(1e-2)
    training = dsbp_jax.spectral_coordinates(case.loss, 6)
    coords, frame = jax.jit(training.init)(case.params, case.x, key=KEY)
    _, grads, seen = jax.jit(
        lambda *args: training.value_and_grad(*args, observe=True)
    )(coords, frame, case.x)
    updates, opt_state = tx.update(grads, tx.init(coords))
    return training, case, optax.apply_updates(coords, updates), frame, opt_state, seen


def test_a_fold_by_turns_is_a_whole_fold(trained):
    training, _, coords, frame, opt_state, seen = trained
    assert training.turns(frame) == 2
    whole = training.fold(coords, frame, opt_state, seen)
    parts = coords, frame, opt_state
    for turn in range(2):
        (path,) = training.group(frame, turn)
        parts = training.fold(*parts, seen, turn=turn)
        assert not parts[0][path].any()
    close(parts[0], whole[0])
    close(parts[1].kernels, whole[1].kernels)
    close(vectors(*parts[1].columns), vectors(*whole[1].columns), 1e-5)
    close(parts[2], whole[2], 1e-5)
    close(training.merge(*parts[:2]), training.merge(coords, frame), 1e-6)


def test_a_fold_of_a_batch_sees_what_its_step_saw(trained):
    training, case, coords, frame, opt_state, _ = trained
    _, _, seen = training.value_and_grad(coords, frame, case.x, observe=True, turn=0)
    (path,) = training.group(frame, 0)
    assert list(seen.layers) == [path]
    results = [
        training.fold(coords, frame, opt_state, given, turn=0)
        for given in (seen, case.x)
    ]
    one, other = (vectors(*frame.columns)[path] for _, frame, _ in results)
    np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-3)


def test_a_fold_may_leave_the_columns(trained):
    training, _, coords, frame, opt_state, _ = trained
    new = training.fold(coords, frame, opt_state, refresh=False, shrink=0.5)
    close(vectors(*new[1].columns), vectors(*frame.columns))
    close(new[2], opt_state)
    before, after = training.merge(coords, frame), training.merge(*new[:2])
    close({p: after[p] for p in "ab"}, {p: before[p] / 2 for p in "ab"}, 1e-6)
    close(after["c"], before["c"])


def test_a_fold_that_is_given_all_copies_nothing_else(trained):
    training, _, coords, frame, opt_state, seen = trained
    coords, frame, opt_state = jax.tree.map(jnp.copy, (coords, frame, opt_state))
    (path,) = training.group(frame, 1)
    _, new, _ = training.fold(coords, frame, opt_state, seen, turn=1, donate=True)
    assert frame.kernels[path].is_deleted()
    (other,) = set(frame.kernels) - {path}
    assert new.kernels[other] is frame.kernels[other]


# Few rows


def test_few_rows_make_kernels_worth_holding_for_their_traffic():
    loss = lambda params, x: jnp.mean((jax.nn.relu(x @ params["w"]) @ params["v"]) ** 2)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {"w": shape(2048, 2048), "v": shape(2048, 2048)}
    for rows, sketched in {1: 0, 32: 0, 512: 2}.items():
        traced = trace(loss, params, (shape(rows, 2048),), {})
        assert len(find_layers(traced, 64, False, step_cost)) == 2
        assert len(find_layers(traced, 64, False, sketch_flops)) == sketched


def test_rows_are_gathered_over_folds():
    """Two rows at a time, of three directions, and four columns that follow them."""
    case = one_layer()
    training = dsbp_jax.spectral_coordinates(case.loss, 4, tracking=0)
    coords, frame = random_frame(case, 4)
    rows = normal(40, 3, seed=5) @ normal(3, 12, seed=6)
    observe = jax.jit(lambda *args: training.value_and_grad(*args, observe=True)[2])
    for index in range(20):
        seen = observe(coords, frame, rows[2 * index : 2 * index + 2])
        coords, frame, _ = training.fold(coords, frame, (), seen)
    basis = vectors(*frame.columns)["w"]
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    left = rows - (rows @ basis) @ basis.T
    assert jnp.linalg.norm(left) < 0.05 * jnp.linalg.norm(rows)


# Narrow kernels


def test_what_rounding_leaves_over_stays():
    """200 folds of an eighth of a unit in the last place move a kernel by 25."""
    dtype, unit, view = jnp.bfloat16, 2.0**-7, MatrixView((0,), (1,))
    ones = jnp.ones((32, 1)) / 32**0.5
    basis, _ = jnp.linalg.qr(jnp.concatenate([ones, normal(32, 3)], axis=1))
    step = jax.jit(
        lambda kernel, coordinate, basis, number: kernels.rounded(
            kernel.astype(jnp.float32) + basis @ coordinate + unit / 8,
            dtype,
            basis,
            view,
            (jnp.uint32(1), number),
        )
    )
    # In columns that hold the change, and in columns that do not.
    for columns, tolerance in ((basis, 1e-3), (basis[:, 1:], 0.05)):
        kernel = jnp.ones((32, 32), dtype)
        coordinate = jnp.zeros((columns.shape[1], 32))
        for number in range(200):
            kernel, inside = step(kernel, coordinate, columns, jnp.int32(number))
            coordinate = inside[0]
        whole = kernel.astype(jnp.float32) + columns @ coordinate
        moved = jnp.mean(whole - 1) / unit
        assert kernel.dtype == dtype
        np.testing.assert_allclose(moved, 25, rtol=tolerance)


def test_narrow_kernels_fold_and_go_on():
    case = mlp()
    narrow = lambda x: x.astype(jnp.bfloat16)
    params, x = jax.tree.map(narrow, case.params), narrow(case.x)
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case._replace(params=params, x=x), 4)
    coords = shifted(coords, frame)
    before = training.merge(coords, frame)
    coords, frame, _ = training.fold(coords, frame, (), refresh=False)
    assert frame.kernels["a"].dtype == jnp.bfloat16
    assert coords["a"].any()
    after = training.merge(coords, frame)
    ulp = jnp.abs(before["a"].astype(jnp.float32)).max() * 2.0**-7
    np.testing.assert_allclose(
        after["a"].astype(jnp.float32), before["a"].astype(jnp.float32), atol=ulp
    )


# Sums in blocks


@pytest.mark.parametrize("shape", [(24, 10), (2, 24, 10)])
def test_sums_in_blocks_are_sums(shape, monkeypatch):
    view = MatrixView(
        (len(shape) - 2,), (len(shape) - 1,), tuple(range(len(shape) - 2))
    )
    basis, thin = normal(*shape[:-1], 3, seed=1), normal(*shape[:-2], 3, 10, seed=2)
    kernel = normal(*shape)
    monkeypatch.setattr(kernels, "_BLOCK", 60)
    if jax.device_count() == 1 and jax.default_backend() == "cpu":
        assert kernels._blocks(view.to_matrix(kernel)) > 1
    found = kernels.kernel_sum(kernel, thin, basis, view)
    np.testing.assert_allclose(found, kernel + basis @ thin, atol=1e-5)


def loops(depth):
    """Those in the programs of `init` and `fold` for so many kernels of a shape."""

    def loss(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    training = dsbp_jax.spectral_coordinates(loss, 4)
    args = {f"w{i}": normal(12, 12, seed=i) / 4 for i in range(depth)}, normal(64, 12)
    start = jax.jit(training.init).lower(*args, key=KEY).compile()
    state = (*start(*args, key=KEY), optax.EmptyState())
    fold = jax.jit(training.fold).lower(*state, args[1]).compile()
    return [program.as_text().count(" while(") for program in (start, fold)]


def test_leaves_of_a_shape_share_a_solve_inside_of_a_program_too():
    few, many = loops(2), loops(5)
    assert few == many
    assert min(few) > 0
