"""What every public transform does, on every kind of leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from tests.marks import quick
from tests.transforms import models
from tests.transforms.catalogue import (
    BARE,
    OPTIMIZERS,
    SHARED,
    SLOW,
    SOURCE_BASES,
    TRANSFORMS,
    UNTRACKED,
    assert_same_types,
    dense_run,
    every,
    few_params,
    is_basis,
    run,
    some_params,
    some_run,
    trained,
    transforms,
    turned,
    whole_run,
    with_gradients,
    wrapped,
)


@transforms
@pytest.mark.parametrize("dtype", quick([jnp.float32, jnp.bfloat16], [jnp.float32]))
def test_shapes_dtypes_and_holes_are_kept(make, dtype):
    updates, state, start, *_ = whole_run(make, dtype)
    assert_same_types(updates, models.params(dtype))
    assert_same_types(state, start)
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
    odd = {"number": 0.5, "complex": jnp.ones((3, 2), jnp.complex64)}
    if make not in OPTIMIZERS:  # optax's own optimizers take no functions
        odd["function"] = jnp.tanh

    def first(params, **odd):
        params = {**params, **odd}
        return make().update(params, make().init(params), params)[0]["dense"]

    expected = jax.jit(first)(params)
    updates = jax.jit(functools.partial(first, **odd))(params)
    np.testing.assert_allclose(updates, expected, atol=1e-6)


@transforms
def test_foreign_arguments_are_tolerated(make):
    updates, _ = run(make(), some_params(), value=1.0, grad_fn=lambda: None)
    expected = some_run(make).updates
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@transforms
def test_compiles_once(make):
    assert whole_run(make).traces == 1


@transforms
def test_masked_and_partitioned(make):
    params = models.params()
    plain = dense_run(make).updates
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
    "spectral_whitening": ({"rank": 3}, "power"),
    "spectral_muon": ({"learning_rate": 0.1, "rank": 3}, "residual"),
}


injected = pytest.mark.parametrize(
    "name", every({name: name for name in INJECTED}, slow=SLOW)
)


@injected
def test_injected_hyperparams_in_bfloat16(name):
    """optax hands them over as arrays in the params' dtype."""
    factory = getattr(dsbp_jax, name)
    arguments, number = INJECTED[name]
    shared = SHARED if "num_blocks" in dsbp_jax.static_args(factory) else BARE
    static = dsbp_jax.static_args(factory)
    tx = optax.inject_hyperparams(factory, static_args=static)(
        **arguments, **{number: 0.2}, **shared
    )
    tx = with_gradients(tx) if name == "spectral_sam" else tx
    params = some_params(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # optax's own parts promote
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert state.hyperparams[number].dtype == jnp.bfloat16
    assert_same_types(updates, params)


@injected
def test_injected_hyperparams_follow_the_plain_trajectory(name):
    factory = getattr(dsbp_jax, name)
    arguments, number = INJECTED[name]
    shared = SHARED if "num_blocks" in dsbp_jax.static_args(factory) else BARE
    static = dsbp_jax.static_args(factory)
    complete = with_gradients if name == "spectral_sam" else lambda tx: tx
    make = lambda value: complete(
        optax.inject_hyperparams(factory, static_args=static)(
            **arguments, **{number: value}, **shared
        )
    )
    plain = complete(factory(**arguments, **{number: 0.2}, **shared))
    actual, state = run(make(0.2), some_params())
    expected, _ = run(plain, some_params())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected
    )
    assert state.hyperparams[number] == pytest.approx(0.2)
    if name not in UNTRACKED:
        assert "dense" in dsbp_jax.bases(state)
    _, state = run(make(optax.linear_schedule(1.0, 0.2, 3)), some_params(), steps=4)
    assert state.hyperparams[number] == pytest.approx(0.2)


def test_injected_without_static_args_says_what_to_do():
    injected = optax.inject_hyperparams(dsbp_jax.dsbp)(learning_rate=0.1, rank=3)
    with pytest.raises(ValueError, match=r"rank must be an int .*STATIC_ARGS"):
        jax.jit(injected.init)(models.params())


@wrapped
@pytest.mark.promotes  # optax's MultiSteps
def test_inside_multi_steps_and_apply_if_finite(make):
    params = some_params()
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


@wrapped
def test_under_scan_vmap_and_cond(make):
    tx, params = make(), some_params()

    def step(state, number):
        updates, state = tx.update(turned(params, number), state, params)
        return state, updates

    @jax.jit
    def scanned(state, flags):
        """The steps of a scan that their flags do not skip."""
        skip = lambda state, _: (state, params)
        body = lambda state, x: jax.lax.cond(x[0], step, skip, state, x[1])
        return jax.lax.scan(body, state, (flags, jnp.arange(4)))

    expected = some_run(make)
    state, updates = scanned(expected.start, jnp.ones(4, bool))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[-1], b, atol=1e-4),
        updates,
        expected.updates,
    )
    assert_same_types(state, expected.state)
    state, _ = scanned(expected.start, jnp.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, state, expected.start)

    seeds = jax.tree.map(lambda p: np.stack([p, p[::-1]]), params)
    both = jax.vmap(lambda p: tx.update(turned(p, 0), tx.init(p), p)[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-4),
        jax.jit(both)(seeds),
        expected.first,
    )


@transforms
def test_map_params_finds_its_structure(make):
    tx, params = make(), models.params()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@transforms
def test_deterministic(make):
    first, second = some_run(make)[:2], run(make(), some_params())
    jax.tree.map(np.testing.assert_array_equal, first, second)


@functools.cache
def unsharded_run(make):
    """The run on params that a mesh of 4 × 2 can hold."""
    return trained(make(), few_params() | {"bias": jnp.ones(8)})


@wrapped
@pytest.mark.parametrize("mode", quick(["auto", "explicit"], ["auto"]))
def test_sharded_params_agree_with_unsharded(make, mode):
    params = few_params() | {"bias": jnp.ones(8)}
    expected = unsharded_run(make).updates
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
    # What is left of a trace has fewer digits, and whitening divides by its root.
    atol = 3e-4 if make is TRANSFORMS["spectral_whitening"] else 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected
    )
    if mode == "explicit":  # an Auto mesh leaves the choice to the compiler
        for name in params:
            assert actual[name].sharding.spec == sharded[name].sharding.spec


@transforms
def test_orbax_round_trip(make, tmp_path):
    import orbax.checkpoint as ocp

    # orbax writes no array without entries
    full = lambda tree: jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
    _, state, start, *_ = whole_run(make)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", full(state))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", full(start))
    jax.tree.map(np.testing.assert_array_equal, restored, full(state))
