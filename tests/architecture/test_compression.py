import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from dsbp_jax.architecture.compression import compiled
from dsbp_jax.layers import leaves_by_path
from tests.architecture import models
from tests.layers.models import normal


def close(found, wanted, tolerance):
    """To a share of the largest entry."""
    scale = float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("build", models.MLPS + models.CNNS, ids=lambda b: b.__name__)
def test_planted_redundancy_is_cut_and_nothing_else(build):
    model = build()
    found = architecture.groups(model.fn, model.params, model.x)
    params = models.planted(model, found, 3)
    before = {
        p: np.array(leaf)
        for p, leaf in leaves_by_path(params).items()
        if hasattr(leaf, "shape")
    }
    plan = architecture.plan(model.fn, params, [model.x], energy=1.0, multiple_of=1)
    for one in plan.groups:
        assert one.width <= one.group.size - 3, plan
        assert one.width >= one.group.size - 4, plan  # relu may have killed one more
    small = architecture.compress(model.fn, params, plan)
    for x in (model.x, model.x[:7]):  # another batch size, too
        (run, small_arrays), (original, arrays) = (
            compiled(fn, leaves, x)
            for fn, leaves in ((small.apply, small.params), (model.fn, params))
        )
        close(run(small_arrays)[0], original(arrays)[0], 1e-5)
    for path, leaf in leaves_by_path(params).items():
        if hasattr(leaf, "shape"):
            np.testing.assert_array_equal(leaf, before[path])
    library = build.__name__.split("_")[0]
    if library in ("linen", "haiku"):  # these check shapes
        assert not small.report.same_function
        assert "refuses" in small.report.note
    elif build is not models.equinox_depthwise:
        assert small.report.same_function


def test_constants_go_into_the_next_bias():
    model = models.plain_mlp()
    params = dict(model.params)
    for column in (3, 7):
        params["up"] = params["up"].at[:, column].set(0)
        params["up_bias"] = params["up_bias"].at[column].set(float(column))
    plan = architecture.plan(model.fn, params, [model.x], energy=1.0, multiple_of=1)
    widths = {one.group.name: one.width for one in plan.groups}
    assert widths["up"] == 14
    small = architecture.compress(model.fn, params, plan)
    close(small.apply(small.params, model.x), model.fn(params, model.x), 1e-5)


def test_constants_pass_batch_norm_but_no_padding():
    """Without padding they go into the running mean; with it one must stay."""

    def net(params, x, padding):
        x = jax.lax.conv_general_dilated(
            x, params["a"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params["a_bias"])
        x = jax.lax.conv_general_dilated(
            x, params["b"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu((x - params["mean"]) * params["scale"])
        return x.mean((1, 2)) @ params["head"]

    shapes = {
        "a": (3, 3, 2, 6),
        "a_bias": (6,),
        "b": (3, 3, 6, 4),
        "mean": (4,),
        "scale": (4,),
        "head": (4, 2),
    }
    params = {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    params["a"] = params["a"].at[..., 1].set(0).at[..., 4].set(0)
    params["a_bias"] = jnp.array([0.0, 1.0, 0.5, 0.0, 2.0, 0.0])
    x = normal(8, 6, 6, 2, seed=9)
    for padding, width in (("VALID", 4), ("SAME", 5)):
        fn = lambda params, x, padding=padding: net(params, x, padding)
        plan = architecture.plan(fn, params, [x], energy=1.0, multiple_of=1)
        assert plan.groups[0].group.name == "a"
        assert plan.groups[0].width == width
        small = architecture.compress(fn, params, plan)
        close(small.apply(small.params, x), fn(params, x), 1e-5)


def test_between_linear_maps_the_eigenbasis_is_cut():
    """Eight neurons that say three things, and a constant, of which two are heard."""

    def fn(params, x):
        h = x @ params["up"] + params["bias"]
        return jnp.tanh(h @ params["down"])

    params = {
        "up": normal(9, 3) @ normal(3, 8, seed=1),
        "bias": normal(8, seed=2),
        "down": normal(8, 2, seed=3),
    }
    x = normal(100, 9, seed=4)
    plan = architecture.plan(fn, params, [x], energy=1.0, multiple_of=1)
    (one,) = plan.groups
    assert (one.group.rotated, one.width) == (True, 2)
    small = architecture.compress(fn, params, plan)
    assert small.params["up"].shape == (9, 2)
    close(small.apply(small.params, x), fn(params, x), 1e-5)


def test_tied_kernels_lose_the_dead_and_no_copies():
    """A copy could go only if the kernel took its rows over."""
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T @ p["head"]
    params = {"w": normal(4, 8), "head": normal(4, 2, seed=1)}
    params["w"] = params["w"].at[:, 2].set(0).at[:, 5].set(params["w"][:, 0])
    x = normal(60, 4, seed=2)
    plan = architecture.plan(fn, params, [x], energy=1.0, multiple_of=1)
    widths = {one.group.name: one.width for one in plan.groups}
    assert widths["w"] == 7
    small = architecture.compress(fn, params, plan)
    close(small.apply(small.params, x), fn(params, x), 1e-5)
    # And with less the loss is what was predicted.
    plan = architecture.plan(
        fn, params, [x], energy=0.9, multiple_of=1, protect=["head"]
    )
    small = architecture.compress(fn, params, plan)
    (one,) = (g for g in plan.groups if g.group.name == "w")
    inner = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    lost = jnp.sum((inner(small.params, x) - inner(params, x)) ** 2)
    share = float(lost / jnp.sum(inner(params, x) ** 2))
    assert 0 < one.error <= 0.1
    assert share == pytest.approx(one.error, rel=1e-3)


@pytest.mark.slow
def test_repair_is_worth_it():
    """Beside the same neurons with the next kernel as it was."""
    model = models.plain_mlp()
    wanted = model.fn(model.params, model.x)
    plan = architecture.plan(
        model.fn, model.params, [model.x], flops=0.5, multiple_of=1
    )
    small = architecture.compress(model.fn, model.params, plan)
    errors = {"repaired": jnp.std(small.apply(small.params, model.x) - wanted)}
    kept = {cut.group.name: np.argmax(cut.encode, axis=0) for cut in plan.cuts}
    bare = dict(model.params)
    for first, name, last in (("up_bias", "up", "mid"), ("mid_bias", "mid", "down")):
        neurons = kept.get(name, np.arange(model.params[name].shape[1]))
        bare[name] = bare[name][:, neurons]
        bare[first] = bare[first][neurons]
        bare[last] = bare[last][neurons]
    errors["bare"] = jnp.std(model.fn(bare, model.x) - wanted)
    assert errors["repaired"] < 0.7 * errors["bare"]


def test_the_small_model_trains():
    model = models.plain_mlp()
    plan = architecture.plan(model.fn, model.params, [model.x], flops=0.5)
    small = architecture.compress(model.fn, model.params, plan)
    y = model.fn(model.params, model.x)

    @jax.jit
    def step(params):
        loss = lambda p: jnp.mean((small.apply(p, model.x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), value

    params, first = step(small.params)
    for _ in range(5):
        params, last = step(params)
    assert last < first


def test_derivatives_are_those_of_the_function_and_its_rules():
    """At exact zeros relu's own rule says 0, and that of its maximum 1/2."""

    @jax.custom_vjp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defvjp(lambda x: (clipped(x), x), lambda x, g: (3 * g,))
    fn = lambda p, x: clipped(jax.nn.relu(x @ p["a"] + p["bias"])) @ p["b"]
    params = {"a": normal(3, 6), "bias": jnp.zeros(6), "b": normal(6, 2)}
    params["a"] = params["a"].at[:, 3:].set(params["a"][:, :3])
    x = jnp.concatenate([normal(40, 3), jnp.zeros((5, 3))])
    plan = architecture.plan(fn, params, [x], energy=1.0, multiple_of=1)
    small = architecture.compress(fn, params, plan)
    assert small.params["a"].shape == (3, 3)
    assert small.report.same_function
    grads = [
        jax.grad(lambda p, f=f: jnp.sum(f(p, x) ** 2))(small.params)
        for f in (small.apply, fn)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *grads)


def test_params_of_other_shapes_are_refused():
    model = models.plain_mlp()
    plan = architecture.plan(model.fn, model.params, [model.x], flops=0.5)
    other = {**model.params, "up": normal(6, 15)}
    with pytest.raises(
        ValueError, match=r"'up' was float32\(6, 16\), got float32\(6, 15\)"
    ):
        architecture.compress(model.fn, other, plan)
    small = architecture.compress(model.fn, model.params, plan)
    with pytest.raises(ValueError, match="must be the smaller leaves"):
        small.apply(model.params, model.x)


def test_apply_compiles_once():
    model = models.plain_mlp()
    plan = architecture.plan(model.fn, model.params, [model.x], flops=0.5)
    small = architecture.compress(model.fn, model.params, plan)
    run = jax.jit(small.apply)
    run(small.params, model.x)
    run(small.params, model.x + 1)
    assert run._cache_size() == 1


def test_another_function_of_the_leaves_runs_on_the_smaller_ones():
    def fn(params, x, training=False):
        hidden = jnp.concatenate([x @ params["left"], x @ params["right"]], axis=1)
        mean = hidden.mean(0) if training else params["mean"]
        return jax.nn.relu(hidden - mean) @ params["down"], mean

    params = {
        "left": normal(4, 8),
        "right": normal(4, 16, seed=1),
        "mean": jnp.zeros(24),
        "down": normal(24, 3, seed=2),
    }
    x = normal(60, 4, seed=3)
    inference = lambda params, x: fn(params, x)[0]
    plan = architecture.plan(inference, params, [x], flops=0.6, multiple_of=1)
    small = architecture.compress(inference, params, plan)
    count = small.params["mean"].size
    assert count < 24
    updated = lambda params, x: (
        fn(params, x, training=True)[0],
        0.9 * params["mean"] + 0.1 * fn(params, x, training=True)[1],
    )
    y, mean = architecture.resized(updated, params, plan.cuts)(small.params, x)
    wanted, _ = fn(small.params, x, training=True)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert mean.shape == (count,)
    ignores = lambda params, x: fn(params, x, training=True)[0]
    with pytest.raises(ValueError, match="take axis 0 of 'mean' apart as the function"):
        architecture.resized(ignores, params, plan.cuts)(small.params, x)


def test_a_network_is_trained_with_dropout_at_the_smaller_sizes():
    def fn(params, x, key=None):
        hidden = jax.nn.relu(x @ params["up"])
        if key is not None:
            kept = jax.random.bernoulli(key, 0.5, hidden.shape)
            hidden = jnp.where(kept, 2 * hidden, 0)
        return hidden @ params["down"]

    params = {"up": normal(4, 32), "down": normal(32, 3, seed=1)}
    x = normal(60, 4, seed=2)
    plan = architecture.plan(fn, params, [x], flops=0.5)
    small = architecture.compress(fn, params, plan)
    training = lambda params, batch: fn(params, *batch)
    run = architecture.resized(training, params, plan.cuts)
    key = jax.random.key(0)
    found = run(small.params, (x, key))
    np.testing.assert_allclose(found, fn(small.params, x, key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [-jnp.inf, -1e9])
def test_the_same_function_is_seen_behind_masks_and_beside_other_outputs(masked):
    fn, params, x = models.plain_mlp()
    many = lambda params, x: (
        jnp.pad(fn(params, x), ((0, 0), (0, 1)), constant_values=masked),
        fn(params, x) > 0,
        jnp.zeros((0,)),
    )
    plan = architecture.plan(many, params, [x], flops=0.5)
    assert architecture.compress(many, params, plan).report.same_function
