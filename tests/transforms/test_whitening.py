"""Spectral whitening against singular value decompositions in float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView

EXACT = {"scale": None, "damping": 0.0}


def spectrum(a, b, values, seed=0):
    """A matrix with these singular values, float64."""
    generator = np.random.default_rng(seed)
    q = len(values)
    u = np.linalg.qr(generator.normal(size=(a, q)))[0]
    v = np.linalg.qr(generator.normal(size=(b, q)))[0]
    return (u * values) @ v.T


def polar(matrix):
    u, _, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u @ v


def whitened(leaf, rank, steps=1, **options):
    """What a leaf becomes after some compiled steps, and the state."""
    tx = dsbp_jax.spectral_whitening(rank, **options)
    tree = {"w": jnp.asarray(leaf, jnp.float32)}
    state, update = tx.init(tree), jax.jit(tx.update)
    for _ in range(steps):
        new, state = update(tree, state)
    return np.asarray(new["w"], np.float64), state


def close(actual, expected, tolerance):
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= tolerance, error


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("factor", [1.0, 1e-15, 1e15])
def test_full_rank_is_the_polar_factor(shape, factor):
    leaf = factor * spectrum(*shape, np.logspace(0, -2, 24))
    close(whitened(leaf, 24, **EXACT)[0], polar(leaf), 1e-4)


VIEWS = {
    "conv": ((3, 3, 4, 6), MatrixView((2,), (3,))),
    "attention": ((10, 2, 4), MatrixView((0,), (1, 2))),
    "per head": ((10, 2, 4), MatrixView((0,), (2,), (1,))),
    "stacked": ((3, 8, 6), MatrixView((1,), (2,), (0,))),
    "stored (out, in)": ((6, 9), MatrixView((1,), (0,))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_whitened_matrix_by_matrix(name):
    shape, view = VIEWS[name]
    leaf = np.random.default_rng(1).normal(size=shape)
    actual, _ = whitened(leaf, 64, layout=Layout({"w": view}), **EXACT)
    matrices = np.asarray(view.to_matrix(jnp.asarray(leaf, jnp.float32)), np.float64)
    *batch, window, d_in, d_out = matrices.shape
    flat = matrices.reshape(*batch, window * d_in, d_out)
    expected = polar(flat).reshape(matrices.shape)
    close(view.to_matrix(jnp.asarray(actual)), expected, 1e-4)


def test_leading_values_come_down_to_the_tail():
    values = np.r_[[100, 50, 30, 20], np.linspace(1.2, 0.8, 28)]
    leaf = spectrum(48, 32, values)
    actual, state = whitened(leaf, 4, steps=6, refresh_every=1, **EXACT)
    found = np.linalg.svd(actual, compute_uv=False)
    tail = np.sqrt(np.mean(values[4:] ** 2))
    # The tail keeps its shape around one, and the spikes lie at its mean.
    np.testing.assert_allclose(np.sort(found)[::-1][:28].max(), 1.2 / tail, rtol=0.01)
    leading = dsbp_jax.bases(state)["w"]
    np.testing.assert_allclose(np.sqrt(leading.values), values[:4], rtol=0.01)
    u, _, v = np.linalg.svd(leaf)
    heads = np.diag(u.T @ actual @ v.T)[:4]
    np.testing.assert_allclose(heads, 1, rtol=0.01)


def test_drifting_spikes_are_followed_without_lag():
    """Spikes that turn a little at each step, a refresh at each step."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(256, 64)) / 16
    left, right = generator.normal(size=(256, 4)), generator.normal(size=(64, 4))
    tx = dsbp_jax.spectral_whitening(4, refresh_every=1, **EXACT)
    update = jax.jit(tx.update)
    state = tx.init({"w": jnp.zeros((256, 64))})
    for _ in range(30):
        left += 0.15 * generator.normal(size=left.shape)
        right += 0.15 * generator.normal(size=right.shape)
        spikes = np.linalg.qr(left)[0] * [40.0, 30, 20, 15] @ np.linalg.qr(right)[0].T
        leaf = {"w": jnp.asarray(noise + spikes, jnp.float32)}
        new, state = update(leaf, state)
    found = np.linalg.svd(np.asarray(new["w"]), compute_uv=False)
    assert found[0] / np.median(found) <= 2.0


def test_nothing_to_do_is_the_identity():
    tx = dsbp_jax.spectral_whitening(4, power=0, residual=1, scale=None)
    tree = {"w": jnp.arange(12.0).reshape(4, 3)}
    jaxpr = jax.make_jaxpr(lambda u: tx.update(u, tx.init(u))[0])(tree)
    assert jaxpr.jaxpr.outvars[0] is jaxpr.jaxpr.invars[0]


def test_power_zero_without_residual_projects():
    leaf = spectrum(20, 12, np.logspace(0, -3, 12))
    actual, _ = whitened(
        leaf, 3, steps=3, power=0.0, residual=0.0, scale=None, refresh_every=1
    )
    u, s, v = np.linalg.svd(leaf)
    close(actual, (u[:, :3] * s[:3]) @ v[:3], 1e-3)


@pytest.mark.parametrize("options", [{"damping": 1e8}, {"rank": 0}])
def test_much_damping_or_no_rank_only_scales(options):
    leaf = spectrum(20, 12, np.logspace(0, -2, 12))
    actual, _ = whitened(leaf, **{"rank": 3, **options})
    cosine = np.sum(actual * leaf) / np.linalg.norm(actual) / np.linalg.norm(leaf)
    assert cosine > 1 - 1e-6
    assert np.linalg.norm(actual) == pytest.approx(np.sqrt(12), rel=1e-4)


@pytest.mark.parametrize("rank", [0, 3, 64])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_scales(rank, shape):
    leaf = np.random.default_rng(0).normal(size=shape)
    a, b = shape
    wanted = {
        "spectral": np.sqrt(min(a, b) * max(1, b / a)),
        "rms": 0.2 * np.sqrt(a * b),
        "update": np.linalg.norm(leaf),
    }
    for scale, norm in wanted.items():
        actual, _ = whitened(leaf, rank, scale=scale)
        assert np.linalg.norm(actual) == pytest.approx(norm, rel=1e-4)


def test_zero_updates_rank_one_and_nan_leave_a_sound_state():
    tx = dsbp_jax.spectral_whitening(3, refresh_every=1)
    update = jax.jit(tx.update)
    zero = {"w": jnp.zeros((10, 8))}
    new, state = update(zero, tx.init(zero))
    assert not new["w"].any()
    one = {"w": jnp.outer(jnp.arange(1.0, 11), jnp.ones(8))}
    new, state = update(one, state)
    assert np.isfinite(new["w"]).all()
    _, after = update({"w": one["w"].at[0, 0].set(jnp.nan)}, state)
    before, after = dsbp_jax.diagnostics(state)["w"], dsbp_jax.diagnostics(after)["w"]
    assert after.failures == before.failures + 1
    new, _ = update(one, state)
    assert np.isfinite(new["w"]).all()


@pytest.mark.parametrize("factor", [1e-15, 1e15])
@pytest.mark.parametrize("rank", [0, 3, 12])
def test_the_scale_of_updates_is_nothing(rank, factor):
    """Nor is that of a loss, or of a clipped gradient, beyond what momentum makes."""
    leaf = spectrum(20, 12, np.logspace(0, -2, 12))
    expected, _ = whitened(leaf, rank, steps=3)
    close(whitened(factor * leaf, rank, steps=3)[0], expected, 1e-5)


@pytest.mark.promotes
def test_clipping_before_momentum_changes_momentum_only():
    leaf = jnp.asarray(spectrum(20, 12, np.logspace(0, -2, 12)), jnp.float32)
    whitening = dsbp_jax.spectral_whitening(3)
    grads = [{"w": leaf * factor} for factor in (1.0, 30.0, 0.2)]

    def last(*before):
        tx = optax.chain(*before, optax.trace(0.9), whitening)
        momentum = optax.chain(*before, optax.trace(0.9))
        state, other = tx.init(grads[0]), momentum.init(grads[0])
        for grad in grads:
            new, state = jax.jit(tx.update)(grad, state)
            plain, other = momentum.update(grad, other)
        return new["w"], plain["w"]

    new, plain = last(optax.clip_by_global_norm(0.5))
    unclipped, _ = last()
    # All gradients being of one direction, momentum is that direction either way.
    close(new, unclipped, 1e-5)
    assert jnp.linalg.norm(plain) < 1.5


def test_bfloat16_updates_are_filtered_in_float32():
    leaf = jnp.asarray(spectrum(20, 12, np.logspace(0, -2, 12)), jnp.bfloat16)
    tx = dsbp_jax.spectral_whitening(3)
    narrow, state = tx.update({"w": leaf}, tx.init({"w": leaf}))
    wide = {"w": leaf.astype(jnp.float32)}
    expected, _ = tx.update(wide, tx.init(wide))
    assert narrow["w"].dtype == jnp.bfloat16
    assert dsbp_jax.bases(state)["w"].vectors.dtype == jnp.float32
    np.testing.assert_array_equal(narrow["w"], expected["w"].astype(jnp.bfloat16))


@pytest.mark.promotes
def test_power_residual_and_damping_are_hyperparameters():
    factory = dsbp_jax.spectral_whitening
    tx = optax.inject_hyperparams(factory, static_args=dsbp_jax.static_args(factory))(
        rank=3, power=0.5, residual=lambda step: 1.0 - 0.5 * step, damping=0.1
    )
    tree = {"w": jnp.asarray(spectrum(20, 12, np.logspace(0, -2, 12)), jnp.float32)}
    state, update = tx.init(tree), jax.jit(tx.update)
    for power, residual in ((0.5, 1.0), (0.25, 0.5)):
        state.hyperparams["power"] = jnp.float32(power)
        inner = state.inner_state
        found, state = update(tree, state)
        plain = factory(3, power=power, residual=residual, damping=0.1)
        expected, _ = plain.update(tree, inner)
        close(found["w"], expected["w"], 1e-6)
    assert update._cache_size() == 1


def test_activations_at_full_rank():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 8)) * np.logspace(0, -1, 8)
    leaf = generator.normal(size=(8, 5))
    capture = dsbp_jax.capture_activations(lambda p, x: x @ p["w"])
    params = {"w": jnp.asarray(leaf, jnp.float32)}
    _, activations = capture(params, jnp.asarray(x, jnp.float32))
    c = x.T @ x / 50
    values, vectors = np.linalg.eigh(c)
    for power in (0.5, 1.0):
        tx = dsbp_jax.spectral_whitening(
            8, source="activation", power=power, damping=0.1, scale=None
        )
        new, _ = tx.update(params, tx.init(params), params, activations=activations)
        damped = values + 0.1 * np.trace(c) / 8
        expected = (vectors * damped**-power) @ vectors.T @ leaf
        close(np.asarray(new["w"]), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["rms", "update", None])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_derivatives_with_the_basis_held(rank, shape, scale):
    """Against differences in float64, all but the bases being free to move."""
    generator = np.random.default_rng(0)
    leaf, direction, weight, other = generator.normal(size=(4, *shape))
    both = lambda leaf: {"u": leaf * other, "w": jnp.asarray(leaf)}

    def loss(leaf, power, damping):
        tx = dsbp_jax.spectral_whitening(
            rank, power=power, damping=damping, scale=scale, residual=0.7
        )
        new, _ = tx.update(both(leaf), state, refresh=False)
        return jnp.vdot(weight, new["w"]) + jnp.vdot(direction, new["u"])

    with jax.enable_x64(True):
        tx = dsbp_jax.spectral_whitening(rank)
        _, state = tx.update(both(leaf), tx.init(both(leaf)))
        at = lambda t: loss(leaf + t * direction, 0.5 + t, 0.1 - t)
        difference = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(at)(0.0), difference, rtol=1e-6)
        zero = jax.grad(loss)(jnp.zeros(shape), 0.5, 0.1)
        assert np.isfinite(zero).all()


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_float32_leaves_have_derivatives_under_float64(rank):
    tx = dsbp_jax.spectral_whitening(rank)
    leaf = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    with jax.enable_x64(True):
        state = tx.init({"w": leaf})
        loss = lambda leaf: jnp.sum(tx.update({"w": leaf}, state)[0]["w"] ** 3)
        gradient = jax.grad(loss)(jnp.asarray(leaf))
    assert gradient.dtype == np.float32
    assert np.isfinite(gradient).all()


def test_coordinates_of_one_shape_have_kernels_of_their_own_sizes():
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(2, 8, 6)).astype(np.float32)
    updates = dict(zip("ab", draws, strict=True))
    sizes = {"a": (64, 6), "b": [8, 12]}  # a pair is a pair
    filtered = lambda tx, updates: tx.update(updates, tx.init(updates))[0]
    together = filtered(dsbp_jax.spectral_whitening(3, sizes=sizes), updates)
    for name, update in updates.items():
        tx = dsbp_jax.spectral_whitening(3, sizes={name: sizes[name]})
        alone = filtered(tx, {name: update})
        close(np.asarray(together[name]), np.asarray(alone[name]), 1e-5)
    plain = filtered(dsbp_jax.spectral_whitening(3), updates)
    assert np.linalg.norm(plain["b"]) != pytest.approx(np.linalg.norm(together["b"]))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scale must be one of .* got 'frobenius'"):
        dsbp_jax.spectral_whitening(3, scale="frobenius")
    with pytest.raises(ValueError, match="rank must be an int of at least 0, got -1"):
        dsbp_jax.spectral_whitening(-1)
    tree = {"w": jnp.ones((40, 40))}
    state = dsbp_jax.spectral_whitening(8).init(tree)
    with pytest.raises(ValueError, match="rank must be 8, that of the state's basis"):
        dsbp_jax.spectral_whitening(4).update(tree, state)


@pytest.mark.promotes
def test_muon_sends_each_leaf_to_its_part():
    def model(params, tokens):
        x = jnp.tanh(params["embedding"][tokens] @ params["hidden"])
        return jnp.tanh(x @ params["next"]) @ params["head"] + params["bias"]

    params = {
        "embedding": jnp.ones((9, 4)),
        "hidden": jnp.eye(4, 6),
        "next": jnp.eye(6, 6),
        "head": jnp.ones((6, 9)),
        "bias": jnp.ones(9),
    }
    roles = dsbp_jax.roles(model, params, jnp.array([1, 2]))
    tx = dsbp_jax.spectral_muon(0.1, 2, hidden=roles, scale="spectral")
    updates, state = tx.update(params, tx.init(params), params)
    assert set(dsbp_jax.bases(state)) == {"hidden", "next"}
    for name in ("hidden", "next"):
        u = updates[name] / -0.1
        assert jnp.linalg.norm(u) == pytest.approx(
            np.sqrt(min(u.shape) * u.shape[1] / u.shape[0]), rel=1e-3
        )
    np.testing.assert_allclose(updates["head"], -0.1, rtol=1e-3)
    named = dsbp_jax.spectral_muon(0.1, 2, hidden=["next"]).init(params)
    assert set(dsbp_jax.bases(named)) == {"next"}
    with pytest.raises(ValueError, match="nxt"):
        dsbp_jax.spectral_muon(0.1, hidden=["nxt"]).init(params)


@pytest.mark.promotes
def test_muon_keeps_float32_momentum_of_bfloat16_params():
    params = {"w": jnp.eye(6, 5, dtype=jnp.bfloat16)}
    tx = dsbp_jax.spectral_muon(0.1, 2)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    momentum = state.inner_states["whitened"].inner_state[0].trace["w"]
    assert momentum.dtype == jnp.float32


@pytest.mark.parametrize("spec", [("x",), (None, "x")])
def test_no_kernel_is_gathered(spec):
    """Kernels spread over eight devices; what is gathered is thin."""
    leaf = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    tx = dsbp_jax.spectral_whitening(4, refresh_every=1)
    expected, state = tx.update({"w": leaf}, tx.init({"w": leaf}))
    expected, _ = tx.update({"w": leaf}, state)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = {"w": jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))}
        update = jax.jit(tx.update).lower(sharded, state).compile()
        actual, _ = update(sharded, state)
    np.testing.assert_allclose(actual["w"], expected["w"], atol=1e-5)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", update.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert max(sizes, default=0) < leaf.size / 4, gathered


def test_further_leaves_of_a_shape_have_no_loops_of_their_own():
    """A slice at a place that the compiler knows is a loop that only one leaf has."""

    def places(leaves):
        params = {f"leaf {n}": jnp.ones((24, 16)) for n in range(leaves)}
        tx = dsbp_jax.spectral_whitening(2)
        update = jax.jit(tx.update).lower(params, tx.init(params), params)
        taken = re.findall(r"slice=\{\[(\d+):(\d+)\]", update.compile().as_text())
        return {int(low) for low, high in taken if int(high) == int(low) + 1}

    # Those that are there are the four numbers behind the eigenvalues.
    assert places(4) == places(12) != set()
