"""What every public transform does, on every kind of leaf.

A new transform enters the table `TRANSFORMS` and gets all of these tests.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg
from dsbp_jax.tracking import Eigenspace
from tests.layers.models import normal
from tests.marks import quick
from tests.transforms import models

# So many Krylov blocks that these small leaves are solved exactly: what is compared
# here is the transform, not the convergence.
BARE = {"layout": models.LAYOUT}
SHARED = {**BARE, "num_blocks": 12}


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
    "spectral_whitening": functools.partial(
        dsbp_jax.spectral_whitening, 3, residual=0.9, refresh_every=2, **SHARED
    ),
    "spectral_muon": functools.partial(
        dsbp_jax.spectral_muon,
        0.1,
        3,
        weight_decay=0.1,
        refresh_every=2,
        hidden=lambda path, leaf: path != "attention",
        layout=models.LAYOUT,
    ),
    "track_bases": functools.partial(
        dsbp_jax.track_bases, 3, refresh_every=2, **SHARED
    ),
}
UNTRACKED = ("add_spectral_transfer", "project_away")
# Those that hand whatever is no matrix to an optimizer of optax.
OPTIMIZERS = [
    TRANSFORMS[name]
    for name in (
        "dsbp",
        "spectral_subspace",
        "spectral_sam",
        "lie_rotation",
        "spectral_muon",
    )
]

# optax's adamw promotes.
PROMOTES = ("spectral_muon",)

# What wraps a transformation, or places it, is one code for all of them: looked at
# often are one that projects, one that divides, and those that follow nothing.
SLOW = (
    *("lie_rotation", "spectral_muon", "spectral_sam", "dsbp"),
    *("spectral_subspace", "track_bases", "add_spectral_decay"),
)


def every(values, *, slow=()):
    """Parameters of a test, by the name of their transform, with its marks."""
    marks = lambda name: [
        *([pytest.mark.promotes] if name in PROMOTES else []),
        *([pytest.mark.slow] if name in slow else []),
    ]
    return [
        pytest.param(value, id=name, marks=marks(name))
        for name, value in values.items()
    ]


transforms = pytest.mark.parametrize("make", every(TRANSFORMS))
wrapped = pytest.mark.parametrize("make", every(TRANSFORMS, slow=SLOW))


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


class Run(NamedTuple):
    """What a few compiled steps give, the state before them, the updates of the
    first alone, and how often they were traced."""

    updates: Any
    state: Any
    start: Any
    first: Any
    traces: int


def trained(tx, params, steps=4, **extra):
    """The run of a transform."""
    traces = []

    @jax.jit
    def update(step, state, params):
        traces.append(1)
        return tx.update(turned(params, step), state, params, **extra)

    start = state = tx.init(params)
    every = []
    for step in range(steps):
        updates, state = update(jnp.int32(step), state, params)
        every.append(updates)
    return Run(every[-1], state, start, every[0], len(traces))


def run(tx, params, dtype=None, **options):
    """Updates and state after a few compiled steps, of leaves cast to a dtype."""
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return trained(tx, params, **options)[:2]


@functools.cache
def whole_run(make, dtype=jnp.float32):
    """The run on every kind of leaf, which several tests look at."""
    return trained(make(), models.params(dtype))


# What is asked of a tree, not of its leaves, is asked of a smaller one.
def some_params(dtype=jnp.float32):
    params = models.params(dtype)
    return {name: params[name] for name in ("dense", "conv", "stacked", "bias", "hole")}


@functools.cache
def some_run(make):
    """The run on a few kinds of leaf, which several tests look at."""
    return trained(make(), some_params())


@functools.cache
def dense_run(make):
    """The run on one kernel alone."""
    return trained(make(), {"dense": models.params()["dense"]})


# What a mesh of 4 × 2 can hold.
def few_params():
    params = models.params()
    return {name: params[name] for name in ("dense", "stacked", "bias")}


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
