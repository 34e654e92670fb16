"""Meshes, checkpoint policies, optimizer chains: where a training step lives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsbp_jax
from tests.backprop.models import one_layer, random_frame, sketch_state
from tests.backprop.test_sketch import KEY, close
from tests.layers.models import normal
from tests.marks import quick


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def spread(mesh, params, x):
    """The parameters and the batch of `one_layer` over a mesh."""
    put = lambda a, *names: jax.device_put(
        a, NamedSharding(mesh, PartitionSpec(*names))
    )
    params = {
        "w": put(params["w"], None, "model"),
        "head": put(params["head"], "model"),
    }
    return params, put(x, "data")


@pytest.mark.parametrize(
    "kind", quick([AxisType.Auto, AxisType.Explicit], [AxisType.Auto])
)
@pytest.mark.parametrize("form", ["sketch", "coordinates"])
def test_sharded_batches_and_kernels(kind, form):
    case = one_layer()  # with columns that do not depend on how sums are ordered
    case = case._replace(x=case.x * 2.0 ** -jnp.arange(12.0))
    spec = PartitionSpec("data") if kind == AxisType.Explicit else None

    def loss(params, x, spec=None):
        h = jnp.tanh(x @ params["w"])
        y = jnp.einsum("nd,de->ne", h, params["head"], out_sharding=spec)
        return jnp.mean(y**2) * 4

    def run(params, x, spec=None):
        sharded = lambda params, x: loss(params, x, spec)
        if form == "sketch":
            backprop = dsbp_jax.spectral_backprop(sharded, 4, refresh_every=2)
            state = backprop.init(params, x, key=KEY)
            _, grads, state = backprop.value_and_grad(params, state, x)
            return grads
        training = dsbp_jax.spectral_coordinates(sharded, 4, tracking=0)
        coords, frame = training.init(params, x, key=KEY)
        _, grads = training.value_and_grad(coords, frame, x)
        coords = jax.tree.map(lambda c, g: c - g, coords, grads)
        coords, frame, _ = training.fold(coords, frame, (), x)
        return training.merge(coords, frame)

    wanted = jax.jit(run)(case.params, case.x)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, x = spread(mesh, case.params, case.x)
        got = jax.jit(run, static_argnums=2)(params, x, spec)
    # A fold has a solve between two products, and takes rounding with it.
    close(jax.device_get(got), wanted, 1e-4 if form == "sketch" else 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_kernels_that_are_tied_and_penalised(kind):
    # Of this draw the columns do not depend on how sums are ordered; of most they do.
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {"w": draw(0, 12, 16) / 4, "heads": draw(1, 16, 4, 8) / 4}
    x = draw(2, 64, 12) * 2.0 ** -jnp.arange(12.0)

    def loss(params, x, explicit=False):
        spec = lambda *names: PartitionSpec(*names) if explicit else None
        product = lambda terms, a, b, *names: jnp.einsum(
            terms, a, b, out_sharding=spec(*names)
        )
        h = jnp.tanh(product("nd,de->ne", x, params["w"], "data", "model"))
        y = product("ne,ehk->nhk", h, params["heads"], "data", "model", None)
        back = product("ne,de->nd", h, params["w"], "data")
        penalty = sum(jnp.sum(leaf**2) for leaf in params.values())
        return jnp.mean(y**2) + jnp.mean(back**2) + 0.1 * penalty

    def run(params, x, explicit=False):
        sharded = lambda params, x: loss(params, x, explicit)
        backprop = dsbp_jax.spectral_backprop(sharded, 4, refresh_every=2)
        state = backprop.init(params, x, key=KEY)
        assert set(dsbp_jax.bases(state)) == {"w", "heads"}
        _, grads, _ = backprop.value_and_grad(params, state, x)
        _, last, _ = backprop.catch_up(params, state, x, every=4)
        return grads, jax.tree.map(lambda g, c: (3 * g + c) / 4, grads, last)

    wanted = jax.jit(run)(params, x)
    close(wanted[1], jax.jit(jax.grad(loss))(params, x), 1e-5)
    mesh = mesh_of(kind)
    put = lambda a, *names: jax.device_put(
        a, NamedSharding(mesh, PartitionSpec(*names))
    )
    with jax.set_mesh(mesh):
        params = {
            "w": put(params["w"], "data", "model"),
            "heads": put(params["heads"], None, "model", None),
        }
        got = jax.jit(run, static_argnums=2)(
            params, put(x, "data"), kind == AxisType.Explicit
        )
        if kind == AxisType.Explicit:
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
            assert jax.tree.map(lambda leaf: leaf.sharding.spec, got[0]) == specs
    close(jax.device_get(got), wanted, 1e-4)


def test_policies_of_checkpoint_see_the_products():
    """Under a policy that saves products nothing is computed twice."""
    width, rows, rank = 64, 128, 4

    def loss(params, x):
        policy = jax.checkpoint_policies.dots_saveable
        block = jax.checkpoint(lambda h, w: jnp.sin(h @ w), policy=policy)
        h = x
        for w in params:
            h = block(h, w)
        return jnp.mean(h**2)

    params = [normal(width, width, seed=i) / 8 for i in range(3)]
    x = normal(rows, width, seed=5)
    backprop = dsbp_jax.spectral_backprop(loss, rank, refresh_every=None)
    state = jax.eval_shape(backprop.init, params, x, key=KEY)
    flops = lambda fn, *args: (
        jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
    )
    full = 2 * rows * width**2
    thin = 2 * rank * (2 * rows * width + width**2)
    # Three forward and two backward products; per layer three thin ones. The sines
    # and cosines count as well.
    products = 5 * full + 3 * thin
    assert flops(backprop.value_and_grad, params, state, x) < 1.03 * products


@pytest.mark.promotes  # optax.adam
def test_in_an_optax_chain_with_flax():
    model = nnx.Sequential(
        nnx.Linear(12, 16, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(16, 1, rngs=nnx.Rngs(1)),
    )
    graph, params = nnx.split(model)
    x, y = normal(64, 12), normal(64, 1, seed=1)
    loss = lambda params, x, y: jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    backprop = dsbp_jax.spectral_backprop(loss, 4, random=2)
    state = jax.jit(backprop.init)(params, x, y, key=KEY)
    opt_state = tx.init(params)
    assert set(dsbp_jax.bases(state)) == {"layers/0/kernel"}

    @jax.jit
    def step(params, state, opt_state):
        value, grads, state = backprop.value_and_grad(params, state, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    values = []
    for _ in range(30):
        params, state, opt_state, value = step(params, state, opt_state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    assert step._cache_size() == 1


def test_sam_perturbs_along_sketched_gradients_and_in_coordinates():
    case = one_layer()
    state = sketch_state(case, 4)
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=None)

    def sketched(params, x):
        value, grads, _ = backprop.value_and_grad(params, state, x)
        return value, grads

    estimate = dsbp_jax.sam_value_and_grad(sketched, 0.05)
    value, grads = jax.jit(estimate)(case.params, case.x)
    _, first = jax.jit(sketched)(case.params, case.x)
    scale = 0.05 / np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(first)))
    moved = jax.tree.map(lambda p, g: p + scale * g, case.params, first)
    close(grads, jax.jit(sketched)(moved, case.x)[1], 1e-5)
    np.testing.assert_allclose(value, case.loss(case.params, case.x), rtol=1e-6)

    coords, frame = random_frame(case, 4)
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    inside = lambda coords, x: training.value_and_grad(coords, frame, x)
    value, _ = jax.jit(dsbp_jax.sam_value_and_grad(inside, 0.05))(coords, case.x)
    np.testing.assert_allclose(value, case.loss(case.params, case.x), rtol=1e-6)


@pytest.mark.parametrize("form", ["sketch", "coordinates"])
def test_a_start_outside_of_a_program_is_that_inside(form):
    """Also with arguments that are no arrays, and on an Explicit mesh."""
    case = one_layer()
    x = case.x * 2.0 ** -jnp.arange(12.0)

    def loss(params, batch, spec=None):
        assert batch["mode"] == "train"
        h = jnp.tanh(batch["x"] @ params["w"])
        y = jnp.einsum("nd,de->ne", h, params["head"], out_sharding=spec)
        return jnp.mean(y**2) * 4

    def run(params, x, spec=None):
        own = lambda params, batch: loss(params, batch, spec)
        batch = {"x": x, "mode": "train"}
        if form == "sketch":
            backprop = dsbp_jax.spectral_backprop(own, 4, refresh_every=2)
            state = backprop.init(params, batch, key=KEY)
            return [b.vectors @ b.vectors.mT for b in dsbp_jax.bases(state).values()]
        training = dsbp_jax.spectral_coordinates(own, 4, tracking=0)
        coords, frame = training.init(params, batch, key=KEY)
        _, grads = training.value_and_grad(coords, frame, batch)
        coords = jax.tree.map(jnp.subtract, coords, grads)
        coords, frame, _ = training.fold(coords, frame, (), batch)
        return training.merge(coords, frame)

    wanted = jax.jit(run)(case.params, x)
    close(run(case.params, x), wanted, 1e-4)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = run(*spread(mesh, case.params, x), PartitionSpec("data"))
    close(jax.device_get(got), jax.device_get(wanted), 5e-4)


def test_coordinates_of_several_seeds_at_once():
    case = one_layer()
    x = case.x * 2.0 ** -jnp.arange(12.0)
    training = dsbp_jax.spectral_coordinates(case.loss, 4, tracking=0)

    def run(key):
        coords, frame = training.init(case.params, x, key=key)
        _, grads = training.value_and_grad(coords, frame, x)
        coords = jax.tree.map(jnp.subtract, coords, grads)
        coords, frame, _ = training.fold(coords, frame, (), x)
        return training.merge(coords, frame)

    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(run))(keys)
    alone = [jax.jit(run)(key) for key in keys]
    # Some processors sum the products of several in another order.
    close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), 1e-3)
