"""What every public transform does, on every kind of leaf.

A new transform enters the table `TRANSFORMS` and gets all of these tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg
from dsbp_jax.tracking import Eigenspace
from tests.layers.models import normal
from tests.transforms import models

# So many Krylov blocks that these small leaves are solved exactly: what is compared
# here is the transform, not the convergence.
SHARED = {"layout": models.LAYOUT, "num_blocks": 12}


def basis(dim, *batch):
    """An input-side basis as of a source task: three random directions."""
    return linalg.EigenBasis(
        jnp.broadcast_to(jnp.linalg.qr(normal(dim, 3))[0], (*batch, dim, 3)),
        jnp.broadcast_to(jnp.array([3.0, 2.0, 1.0]), (*batch, 3)),
        jnp.full(batch, 7.0),
    )


SOURCE_BASES = {
    "dense": basis(12),
    "conv": basis(6),
    "stacked": basis(10, 3),
    "stored (out, in)": basis(12),
    "square": Eigenspace(
        basis(10), jnp.array(True), models.LAYOUT["square"], "input", "activation"
    ),
}


def gradients(params, step):
    """What evaluates gradients itself gets these."""
    del step
    return jax.tree.map(lambda p: p * (1 + 0.1 * jnp.sin(p)), params)


def with_gradients(tx):
    """The same transformation, `update` with a `grad_fn`."""
    update = lambda *args, **extra: tx.update(*args, **{**extra, "grad_fn": gradients})
    return optax.GradientTransformationExtraArgs(tx.init, update)


TRANSFORMS = {
    "spectral_projection": functools.partial(
        dsbp_jax.spectral_projection, 3, residual=0.2, **SHARED
    ),
    "add_spectral_decay": functools.partial(
        dsbp_jax.add_spectral_decay, 0.1, source="gradient", **SHARED
    ),
    "dsbp": functools.partial(
        dsbp_jax.dsbp, 0.1, 3, decay=0.01, energy=0.99, refresh_every=2, **SHARED
    ),
    "spectral_subspace": functools.partial(
        dsbp_jax.spectral_subspace,
        optax.sgd(0.1, momentum=0.9),
        3,
        side="output",
        residual=0.2,
        max_growth=1.01,
        refresh_every=2,
        **SHARED,
    ),
    "spectral_sam": lambda: with_gradients(
        dsbp_jax.spectral_sam(optax.sgd(0.1, momentum=0.9), 0.1, rank=3, **SHARED)
    ),
    "lie_rotation": functools.partial(
        dsbp_jax.lie_rotation,
        0.01,
        rank=3,
        side="output",
        momentum=0.9,
        radial=0.2,
        refresh_every=2,
        **SHARED,
    ),
    "add_spectral_transfer": functools.partial(
        dsbp_jax.add_spectral_transfer,
        0.1,
        models.params(seed=1),
        SOURCE_BASES,
        layout=models.LAYOUT,
    ),
    "project_away": functools.partial(
        dsbp_jax.project_away, SOURCE_BASES, layout=models.LAYOUT
    ),
    "track_bases": functools.partial(
        dsbp_jax.track_bases, 3, refresh_every=2, **SHARED
    ),
}
UNTRACKED = ("add_spectral_transfer", "project_away")
# Those that hand whatever is no matrix to an optimizer of optax.
OPTIMIZERS = [
    TRANSFORMS[name]
    for name in ("dsbp", "spectral_subspace", "spectral_sam", "lie_rotation")
]

transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def assert_same_types(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_equal(
            (jnp.shape(x), jnp.result_type(x)), (jnp.shape(y), jnp.result_type(y))
        ),
        a,
        b,
    )


def is_basis(node):
    return isinstance(node, linalg.EigenBasis)


def angles(leaf, step):
    return (step * jnp.arange(leaf.shape[-1])).astype(jnp.float32)


def turned(params, step):
    """Gradients whose eigenbasis turns: stale and fresh make a difference."""
    weigh = lambda p: 1 + 0.5 * jnp.cos(angles(p, step))
    return jax.tree.map(lambda p: p * weigh(p).astype(p.dtype), params)


def run(tx, params, steps=4, dtype=None, **extra):
    """Updates and state after a few compiled steps, of leaves cast to a dtype."""
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    update = jax.jit(functools.partial(tx.update, **extra))
    state, updates = tx.init(params), None
    for step in range(steps):
        grads = turned(params, jnp.int32(step))
        updates, state = update(grads, state, params)
    return updates, state


@transforms
@dtypes
def test_shapes_dtypes_and_holes_are_kept(make, dtype):
    tx, params = make(), models.params(dtype)
    updates, state = run(tx, params)
    assert_same_types(updates, params)
    assert_same_types(state, tx.init(params))
    for leaf in jax.tree.leaves(state, is_leaf=is_basis):
        if is_basis(leaf):
            assert leaf.vectors.dtype == jnp.float32
    assert all(
        np.isfinite(np.asarray(u, "float32")).all() for u in jax.tree.leaves(updates)
    )


@transforms
def test_odd_leaves_pass_and_the_others_are_updated_as_without_them(make):
    if make is TRANSFORMS["spectral_sam"]:
        pytest.skip("its norm is over all leaves together")
    params = {"dense": models.params()["dense"]}
    expected, _ = make().update(params, make().init(params), params)
    odd = {"number": 0.5, "complex": jnp.ones((3, 2), jnp.complex64)}
    if make not in OPTIMIZERS:  # optax's own optimizers take no functions
        odd["function"] = jnp.tanh
    both = {**params, **odd}
    updates, _ = make().update(both, make().init(both), both)
    np.testing.assert_allclose(updates["dense"], expected["dense"], atol=1e-6)


@transforms
def test_foreign_arguments_are_tolerated(make):
    updates, _ = run(make(), models.params(), value=1.0, grad_fn=lambda: None)
    expected, _ = run(make(), models.params())
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@transforms
def test_compiles_once(make):
    traces, tx, params = [], make(), models.params()

    @jax.jit
    def update(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    assert len(traces) == 1


@transforms
def test_masked_and_partitioned(make):
    params = models.params()
    plain, _ = run(make(), {"dense": params["dense"]})
    mask = {name: name == "dense" for name in params}
    masked, state = run(optax.masked(make(), mask), params)
    np.testing.assert_allclose(masked["dense"], plain["dense"], atol=1e-5)
    held = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_basis) if is_basis(leaf)]
    assert len(held) == 1
    assert held[0].vectors.shape[0] in params["dense"].shape
    labels = {name: "spectral" if name == "dense" else "plain" for name in params}
    transforms = {"spectral": make(), "plain": optax.sgd(0.1)}
    split, _ = run(optax.partition(transforms, labels), params)
    np.testing.assert_allclose(split["dense"], plain["dense"], atol=1e-5)
    expected, _ = run(optax.sgd(0.1), params)
    np.testing.assert_allclose(split["bias"], expected["bias"], rtol=1e-5)


# Arguments for the factories, and the number among them that a schedule may move
# (track_bases has none).
INJECTED = {
    "spectral_projection": ({"rank": 3}, "residual"),
    "add_spectral_decay": ({"source": "gradient"}, "strength"),
    "dsbp": ({"learning_rate": 0.1, "rank": 3}, "residual"),
    "spectral_subspace": (
        {"inner": optax.sgd(0.1), "rank": 3, "side": "output"},
        "residual",
    ),
    "spectral_sam": ({"inner": optax.sgd(0.1), "rank": 3}, "rho"),
    "lie_rotation": ({"learning_rate": 0.01, "rank": 3, "side": "output"}, "radial"),
    "add_spectral_transfer": (
        {"source_params": models.params(seed=1), "source_bases": SOURCE_BASES},
        "strength",
    ),
    "project_away": ({"source_bases": SOURCE_BASES}, "energy"),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparams_in_bfloat16(name):
    """optax hands them over as arrays in the params' dtype."""
    factory = getattr(dsbp_jax, name)
    arguments, number = INJECTED[name]
    shared = {"layout": models.LAYOUT} if name in UNTRACKED else SHARED
    static = "layout" if name in UNTRACKED else dsbp_jax.STATIC_ARGS
    tx = optax.inject_hyperparams(factory, static_args=static)(
        **arguments, **{number: 0.2}, **shared
    )
    tx = with_gradients(tx) if name == "spectral_sam" else tx
    params = models.params(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # optax's own parts promote
        updates, state = tx.update(params, tx.init(params), params)
    assert state.hyperparams[number].dtype == jnp.bfloat16
    assert_same_types(updates, params)


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparams_follow_the_plain_trajectory(name):
    factory = getattr(dsbp_jax, name)
    arguments, number = INJECTED[name]
    shared = {"layout": models.LAYOUT} if name in UNTRACKED else SHARED
    static = "layout" if name in UNTRACKED else dsbp_jax.STATIC_ARGS
    complete = with_gradients if name == "spectral_sam" else lambda tx: tx
    make = lambda value: complete(
        optax.inject_hyperparams(factory, static_args=static)(
            **arguments, **{number: value}, **shared
        )
    )
    plain = complete(factory(**arguments, **{number: 0.2}, **shared))
    actual, state = run(make(0.2), models.params())
    expected, _ = run(plain, models.params())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected
    )
    assert state.hyperparams[number] == pytest.approx(0.2)
    if name not in UNTRACKED:
        assert "dense" in dsbp_jax.bases(state)
    _, state = run(make(optax.linear_schedule(1.0, 0.2, 3)), models.params(), steps=4)
    assert state.hyperparams[number] == pytest.approx(0.2)


def test_injected_without_static_args_says_what_to_do():
    injected = optax.inject_hyperparams(dsbp_jax.dsbp)(learning_rate=0.1, rank=3)
    with pytest.raises(ValueError, match=r"rank must be an int .*STATIC_ARGS"):
        jax.jit(injected.init)(models.params())


@transforms
@pytest.mark.promotes  # optax's MultiSteps
def test_inside_multi_steps_and_apply_if_finite(make):
    params = models.params()
    accumulating = optax.MultiSteps(make(), every_k_schedule=2)
    state = accumulating.init(params)
    update = jax.jit(accumulating.update)
    first, state = update(params, state, params)
    second, state = update(params, state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(first))
    assert any(leaf.any() for leaf in jax.tree.leaves(second))
    guarded = optax.apply_if_finite(make(), max_consecutive_errors=3)
    bad = {**params, "dense": params["dense"].at[0, 0].set(jnp.nan)}
    updates, state = jax.jit(guarded.update)(bad, guarded.init(params), params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert state.total_notfinite == 1


@transforms
def test_under_scan_vmap_and_cond(make):
    tx, params = make(), models.params()

    def body(state, step):
        updates, state = tx.update(turned(params, step), state, params)
        return state, updates

    steps = jnp.arange(4)
    state, scanned = jax.jit(lambda s: jax.lax.scan(body, s, steps))(tx.init(params))
    looped, loop_state = run(tx, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[-1], b, atol=1e-4), scanned, looped
    )
    assert_same_types(state, loop_state)
    step = lambda state: body(state, jnp.int32(1))[0]
    cond = jax.jit(lambda flag, s: jax.lax.cond(flag, step, lambda s: s, s))
    assert_same_types(cond(True, state), state)

    seeds = jax.tree.map(lambda p: jnp.stack([p, p[::-1]]), params)
    states = jax.vmap(tx.init)(seeds)
    batched, _ = jax.jit(jax.vmap(tx.update))(seeds, states, seeds)
    alone, _ = jax.jit(tx.update)(params, tx.init(params), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-4), batched, alone
    )


@transforms
def test_map_params_finds_its_structure(make):
    tx, params = make(), models.params()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@transforms
def test_deterministic(make):
    first, second = (run(make(), models.params()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@transforms
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_sharded_params_agree_with_unsharded(make, mode):
    params = {name: models.params()[name] for name in ("dense", "stacked")}
    params["bias"] = jnp.ones(8)
    expected, _ = run(make(), params)
    kind = {
        "auto": jax.sharding.AxisType.Auto,
        "explicit": jax.sharding.AxisType.Explicit,
    }[mode]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"dense": ("x", "y"), "stacked": (None, "y", "x"), "bias": ("x",)}
    with jax.set_mesh(mesh):
        sharded = {
            name: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*specs[name])))
            for name, leaf in params.items()
        }
        actual, _ = run(make(), sharded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), actual, expected
    )
    if mode == "explicit":  # an Auto mesh leaves the choice to the compiler
        for name in params:
            assert actual[name].sharding.spec == sharded[name].sharding.spec


@transforms
def test_orbax_round_trip(make, tmp_path):
    import orbax.checkpoint as ocp

    params = models.params()
    del params["empty"]  # orbax writes no array without entries
    _, state = run(make(), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", make().init(params))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
