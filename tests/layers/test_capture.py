import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsbp_jax.layers import capture_activations, layout, leaves_by_path
from tests.layers.models import CLOSED_OVER, CLOSURES, normal


def assert_trees_close(got, wanted, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


def assert_trees_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# Every model


def test_eager_result_is_the_functions_own_and_every_site_is_found(model):
    out, activations = capture_activations(model.fn)(model.params, *model.args)
    wanted = model.fn(model.params, *model.args)
    assert jax.tree.structure(out) == jax.tree.structure(wanted)
    # Not to the bit: what is compiled together may round differently.
    assert_trees_close(out, wanted)
    shapes = {
        name: (layer.inputs.shape, layer.outputs.shape)
        for name, layer in activations.items()
    }
    assert shapes == model.shapes
    # Where a kernel is a plain matrix, what was captured multiplies out.
    views = layout(model.fn, model.params, *model.args)
    leaves = leaves_by_path(model.params)
    assert list(views) == list(activations)
    for name, layer in activations.items():
        assert layer.count.dtype == jnp.int32
        matrix = views[name].to_matrix(leaves[name.split("#")[0]])
        if matrix.shape[-3] > 1 or not np.all(layer.count):
            continue  # a convolution with several taps, a branch not taken
        matrix, inputs = np.asarray(matrix)[..., 0, :, :], np.asarray(layer.inputs)
        tolerance = 2e-2 if inputs.dtype == jnp.bfloat16 else 2e-6
        assert_trees_close(layer.outputs, inputs.astype(np.float32) @ matrix, tolerance)


def test_compiled_gradient_is_the_functions_own(model):
    def loss(fn, params):
        result = fn(params, *model.args)
        out, aux = result if fn is not model.fn else (result, {})
        return sum(
            jnp.mean(y.astype(jnp.float32) ** 2) for y in jax.tree.leaves(out)
        ), aux

    params, static = eqx.partition(model.params, eqx.is_inexact_array)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grad(fn, params):
        whole = lambda params: loss(fn, eqx.combine(params, static))
        return jax.value_and_grad(whole, has_aux=True)(params)

    (value, activations), gradient = value_and_grad(
        capture_activations(model.fn), params
    )
    (wanted_value, _), wanted = value_and_grad(model.fn, params)
    assert_trees_close(value, wanted_value)
    # bfloat16 rounds differently where fusion differs.
    half = any(layer.inputs.dtype == jnp.bfloat16 for layer in activations.values())
    assert_trees_close(gradient, wanted, 1e-2 if half else 2e-6)


# What is captured, by hand


def mlp(params, x):
    return jax.nn.relu(x @ params["a"] + params["bias"]) @ params["b"]


@pytest.fixture
def mlp_params():
    return {"a": normal(4, 3), "b": normal(3, 2, seed=1), "bias": normal(1, 3)}


@pytest.mark.usefixtures("strict_promotion")
class TestDense:
    def test_rows_by_hand(self, mlp_params):
        x = normal(2, 5, 4)

        def model(params, x):
            return mlp(params | {"bias": params["bias"][None]}, x)

        out, activations = capture_activations(model)(mlp_params, x)
        rows = x.reshape(10, 4)
        hidden = jax.nn.relu(rows @ mlp_params["a"] + mlp_params["bias"])
        np.testing.assert_array_equal(activations["a"].inputs, rows)
        assert_trees_close(activations["a"].outputs, rows @ mlp_params["a"])
        assert_trees_close(activations["b"].inputs, hidden)
        assert_trees_close(activations["b"].outputs, out.reshape(10, 2))
        assert activations["a"].count == 10

    def test_which_sides(self, mlp_params):
        for side, other in (("inputs", "outputs"), ("outputs", "inputs")):
            captured = capture_activations(mlp, which=(side,))
            _, activations = captured(mlp_params, normal(5, 4))
            assert getattr(activations["a"], other) is None
            assert getattr(activations["a"], side) is not None
            assert activations["a"].count == 5

    def test_vmap_over_ensembles(self, mlp_params):
        stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), mlp_params)
        captured = capture_activations(mlp)
        out, activations = jax.vmap(captured, (0, None))(stacked, normal(5, 4))
        for i in range(2):
            single = jax.tree.map(lambda p, i=i: p[i], stacked)
            assert_trees_close(
                jax.tree.map(lambda a, i=i: a[i], (out, activations)),
                captured(single, normal(5, 4)),
            )

    def test_in_the_aux_of_a_loss(self, mlp_params):
        def loss(params, x):
            out, activations = capture_activations(mlp)(params, x)
            return jnp.sum(out), activations

        (_, activations), gradient = jax.value_and_grad(loss, has_aux=True)(
            mlp_params, normal(5, 4)
        )
        wanted = jax.grad(lambda p: jnp.sum(mlp(p, normal(5, 4))))(mlp_params)
        assert_trees_close(gradient, wanted)
        np.testing.assert_array_equal(activations["a"].inputs, normal(5, 4))

    def test_activations_are_differentiable(self, mlp_params):
        def penalty(params, x):
            _, activations = capture_activations(mlp)(params, x)
            return jnp.sum(activations["b"].inputs)

        wanted = jax.grad(
            lambda p: jnp.sum(jax.nn.relu(normal(5, 4) @ p["a"] + p["bias"]))
        )(mlp_params)
        assert_trees_close(jax.grad(penalty)(mlp_params, normal(5, 4)), wanted)

    def test_second_derivatives(self, mlp_params):
        square = lambda fn: lambda p: jnp.sum(fn(p)[0] ** 2)
        x = normal(5, 4)
        hvp = lambda f: jax.jvp(jax.grad(f), (mlp_params,), (mlp_params,))[1]
        got = hvp(square(lambda p: capture_activations(mlp)(p, x)))
        assert_trees_close(got, hvp(square(lambda p: (mlp(p, x),))))

    def test_compiles_once(self, mlp_params):
        captured = jax.jit(capture_activations(mlp))
        captured(mlp_params, normal(5, 4))
        captured(mlp_params, normal(5, 4, seed=1))
        assert captured._cache_size() == 1


@pytest.mark.usefixtures("strict_promotion")
class TestControlFlow:
    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_branches_not_taken_add_no_rows(self, index):
        def model(params, x, index):
            branches = [lambda x: x @ params["a"], lambda x: x @ params["b"], jnp.sin]
            return lax.switch(index, branches, x)

        params, x = {"a": normal(3, 3), "b": normal(3, 3, seed=1)}, normal(4, 3)
        captured = jax.jit(capture_activations(model))
        out, activations = captured(params, x, jnp.int32(index))
        for i, name in enumerate("ab"):
            taken = i == index
            layer = activations[name]
            assert layer.count == (4 if taken else 0)
            wanted = x if taken else jnp.zeros_like(x)
            np.testing.assert_array_equal(layer.inputs, wanted)
            assert_trees_close(layer.outputs, out if taken else jnp.zeros_like(out))

    def test_branch_inside_a_loop_is_counted_per_iteration(self):
        def model(params, x):
            def body(h, i):
                step = lambda h: jnp.tanh(h @ params["w"])
                return lax.cond(i % 2 == 0, step, lambda h: h, h), None

            return lax.scan(body, x, jnp.arange(5))[0]

        params, x = {"w": normal(3, 3)}, normal(4, 3)
        _, activations = capture_activations(model)(params, x)
        rows, count = activations["w"].rows("input")
        assert activations["w"].count == 12
        assert count == 12
        assert np.count_nonzero(np.any(rows != 0, axis=-1)) == 12
        _, few = capture_activations(model, max_rows=7)(params, x)
        kept = np.any(few["w"].inputs != 0, axis=-1)
        assert few["w"].count == np.count_nonzero(kept)

    def test_rules_of_the_user_survive(self):
        @jax.custom_vjp
        def through(x, w):
            return jnp.round(x) @ w

        through.defvjp(
            lambda x, w: (through(x, w), (x, w)),
            lambda res, g: (7.0 * g @ res[1].T, res[0].T @ g),
        )
        model = lambda params, x: jnp.sum(through(x @ params["a"], params["b"]) ** 2)
        params, x = {"a": normal(3, 4), "b": normal(4, 2)}, normal(5, 3)
        captured = capture_activations(model)
        got = jax.grad(lambda p: captured(p, x)[0])(params)
        assert_trees_equal(got, jax.grad(model)(params, x))
        _, activations = captured(params, x)
        np.testing.assert_array_equal(
            activations["b"].inputs, jnp.round(x @ params["a"])
        )


def test_computation_in_bfloat16_is_captured_as_such():
    model = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    out, activations = capture_activations(model)({"w": normal(4, 3)}, normal(5, 4))
    assert activations["w"].inputs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(activations["w"].outputs, out)


# Subsampling


@pytest.mark.parametrize("limit", [1, 5, 7, 11, 24, 100])
def test_max_rows_keeps_distinct_aligned_rows(limit):
    params, x = {"w": jnp.eye(2)}, jnp.stack([jnp.arange(24.0)] * 2, axis=1)
    model = lambda p, x: x.reshape(4, 6, 2) @ p["w"]
    _, activations = capture_activations(model, max_rows=limit)(params, x)
    layer = activations["w"]
    assert layer.count == min(limit, 24)
    np.testing.assert_array_equal(layer.inputs, layer.outputs)
    kept = np.asarray(layer.inputs[:, 0])
    assert len(set(kept)) == min(limit, 24)
    if 4 <= limit <= 24:  # spread over the whole, not in step with length 6
        assert len(set(kept // 6)) == 4
        assert len(set(kept % 6)) >= min(limit, 4)


def test_max_rows_caps_stacks_and_loops():
    def model(params, x):
        def outer(h, w):
            inner = lambda h, _: (h @ w, None)
            return lax.scan(inner, h, length=3)[0], None

        return lax.scan(outer, x, params["w"])[0]

    params, x = {"w": normal(2, 3, 3)}, normal(8, 3)
    _, activations = capture_activations(model, max_rows=10)(params, x)
    assert activations["w"].inputs.shape == (2, 10, 3)
    np.testing.assert_array_equal(activations["w"].count, [10, 10])


# Arguments and results


def test_arguments_may_be_static_or_named():
    def model(params, x, mode, *, scale, train=False):
        assert mode == "sum"
        y = scale * (x @ params["w"])
        return {"y": y, "mode": mode, "loss": y.sum() if train else None, "n": 3}

    params = {"w": normal(4, 3), "name": "layer", "act": jnp.tanh, "none": None}
    arguments = {"scale": jnp.float32(2.0), "train": True}
    out, activations = capture_activations(model)(
        params, normal(5, 4), "sum", **arguments
    )
    wanted = model(params, normal(5, 4), "sum", **arguments)
    assert out["mode"] == "sum"
    assert out["n"] == 3
    np.testing.assert_array_equal(out["y"], wanted["y"])
    np.testing.assert_array_equal(out["loss"], wanted["loss"])
    assert list(activations) == ["w"]


def test_numpy_params_and_closed_over_data():
    x = np.asarray(normal(5, 4))
    model = lambda params: jnp.sum(x @ params["w"])
    params = {"w": np.asarray(normal(4, 3))}
    _, activations = capture_activations(model)(params)
    np.testing.assert_array_equal(activations["w"].inputs, x)


@pytest.mark.parametrize("call", CLOSURES.values(), ids=CLOSURES)
def test_layers_after_a_body_that_holds_data(call):
    model = lambda params: call(params["a"]) @ params["b"]
    params = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
    out, activations = capture_activations(model)(params)
    assert_trees_close(out, model(params))
    np.testing.assert_array_equal(activations["a"].inputs.squeeze(), CLOSED_OVER)
    assert_trees_close(activations["b"].inputs, call(params["a"]))
    assert_trees_close(activations["b"].outputs, out)


# Meshes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("max_rows", [None, 10])
def test_sharded_params_and_rows(kind, max_rows):
    explicit = kind == AxisType.Explicit

    def model(params, x, sharding=None):
        h = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, params["q"]))
        h = jnp.einsum("bthk,hkd->btd", h, params["o"], out_sharding=sharding)
        h, _ = lax.scan(lambda h, w: (jnp.matmul(h, w), None), h, params["s"])
        step = lambda h: jnp.matmul(h, params["c"])
        return lax.cond(jnp.sum(x) < 0, jnp.negative, step, h)

    params = {"q": normal(8, 4, 2), "o": normal(4, 2, 8), "s": normal(2, 8, 8)}
    params["c"] = normal(8, 8)
    x = 1.0 + normal(8, 3, 8)
    captured = capture_activations(model, max_rows=max_rows)
    wanted = jax.jit(captured)(params, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"q": (None, "model"), "o": ("model",), "s": (), "c": ()}
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        sharded = {name: put(params[name], *specs[name]) for name in params}
        sharding = PartitionSpec("data") if explicit else None
        got = jax.jit(captured, static_argnums=2)(sharded, put(x, "data"), sharding)
    assert_trees_close(got, wanted)


def test_inside_a_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")

    def model(params, x):
        step = lambda x: x @ params["w"]
        return lax.cond(jnp.sum(x) > 0, step, lambda x: x, x)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    def inputs(params, x):
        return capture_activations(model)(params, x)[1]["w"].inputs

    x = jnp.abs(normal(16, 3))
    np.testing.assert_array_equal(inputs({"w": normal(3, 3)}, x), x)


# Errors


@pytest.mark.parametrize("value", [0, -1, 2.5, True, np.bool_(True), "8"])
def test_max_rows_must_be_a_positive_integer(value):
    with pytest.raises(ValueError, match=r"max_rows must be an int of at least 1, got"):
        capture_activations(mlp, max_rows=value)


def test_max_rows_may_be_a_numpy_integer(mlp_params):
    captured = capture_activations(mlp, max_rows=np.int64(3))
    assert captured(mlp_params, normal(5, 4))[1]["a"].inputs.shape == (3, 4)


@pytest.mark.parametrize(
    "value", ["inputs", (), ("input",), ("inputs", "x"), 3, None, [["inputs"]]]
)
def test_which_must_name_sides(value):
    with pytest.raises(ValueError, match=r"which must be a tuple of \"inputs\""):
        capture_activations(mlp, which=value)


def test_params_that_match_no_layer():
    model = lambda params, x: x * params["scale"]
    with pytest.raises(ValueError, match=r"params match no layer.*explain"):
        capture_activations(model)({"scale": normal(4)}, normal(5, 4))


def test_two_leaves_of_one_path():
    params = {"a/b": normal(4, 3), "a": {"b": normal(4, 3)}}
    model = lambda params, x: x @ params["a/b"]
    with pytest.raises(ValueError, match=r"two parameter leaves share"):
        capture_activations(model)(params, normal(5, 4))
