"""Sketched gradients against dense projections of exact ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_jax
from dsbp_jax.backprop.columns import vectors
from dsbp_jax.backprop.sketch import _stable_residual
from dsbp_jax.linalg import EigenBasis
from tests.backprop.models import CASES, Case, mlp, one_layer, projected, sketch_state
from tests.layers.models import normal

KEY = jax.random.key(7)


def close(actual, wanted, tolerance=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=tolerance * np.abs(b).max(), rtol=tolerance
        ),
        actual,
        wanted,
    )


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_exact_one_projected(name, strict_promotion):
    case = CASES[name]()
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    columns = vectors(*state.columns)
    assert set(columns) == set(case.sketched)
    value, grads, _ = jax.jit(backprop.value_and_grad)(case.params, state, case.x)
    exact_value, exact = jax.jit(jax.value_and_grad(case.loss))(case.params, case.x)
    np.testing.assert_allclose(value, exact_value, rtol=1e-6)
    wanted = projected(case, exact, columns)
    close(grads, wanted)
    for path in columns:  # and that is not the exact gradient
        largest = np.abs(exact[path]).max()  # 0 where a branch is not taken
        assert largest == 0 or np.abs(grads[path] - exact[path]).max() > 1e-4 * largest


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu])
def test_gradients_of_inputs_are_exact(activation):
    case = mlp(activation)
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    sketched = lambda x: backprop.value_and_grad(case.params, state, x)[0]
    actual = jax.jit(jax.grad(sketched))(case.x)
    close(actual, jax.jit(jax.grad(case.loss, 1))(case.params, case.x), 1e-6)


def test_second_derivatives_are_those_of_the_sketched_gradient():
    """Differentiating `BBᵀG(x)` by x: the outer derivative is not sketched again."""
    case = mlp(jnp.tanh)
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    columns = vectors(*state.columns)

    def inner(params, exact):
        if exact:
            grads = projected(case, jax.grad(case.loss)(params, case.x), columns)
        else:
            grads = backprop.value_and_grad(params, state, case.x)[1]
        return sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))

    outer = jax.jit(jax.grad(inner), static_argnums=1)
    actual, wanted = (outer(case.params, exact) for exact in (False, True))
    close(actual, wanted, 1e-5)


def test_full_residual_is_unbiased():
    case = mlp()
    backprop = dsbp_jax.spectral_backprop(
        case.loss, 2, random=2, residual=1.0, refresh_every=None
    )
    state = sketch_state(case, 2)
    draws = 4000

    @jax.jit
    def many(state):
        def draw(state, _):
            _, grads, state = backprop.value_and_grad(case.params, state, case.x)
            kept = {path: grads[path] for path in ("a", "b")}
            return state, (kept, jax.tree.map(jnp.square, kept))

        return jax.tree.map(
            lambda x: x.mean(0), jax.lax.scan(draw, state, length=draws)[1]
        )

    mean, square = many(state)
    exact = jax.grad(case.loss)(case.params, case.x)
    for path in ("a", "b"):
        deviation = np.sqrt(np.maximum(square[path] - mean[path] ** 2, 0))
        varies = deviation > 1e-3 * np.abs(exact[path]).max()
        assert varies.mean() > 0.9
        z = (mean[path] - exact[path])[varies] / deviation[varies] * draws**0.5
        assert np.abs(z).max() < 5
        assert 0.5 < z.std() < 1.6


def test_residual_scales_what_is_outside():
    """The mean over draws is `VVᵀG + κ(I − VVᵀ)G`."""
    case = mlp()
    exact = jax.grad(case.loss)(case.params, case.x)["b"]
    means = {}
    for residual in (0.0, 0.25):
        backprop = dsbp_jax.spectral_backprop(
            case.loss, 3, random=3, residual=residual, refresh_every=None
        )
        state = sketch_state(case, 3)
        basis = vectors(*state.columns)["b"]

        @jax.jit
        def mean(state, backprop=backprop):
            def draw(state, _):
                _, grads, state = backprop.value_and_grad(case.params, state, case.x)
                return state, grads["b"]

            return jax.lax.scan(draw, state, length=2000)[1].mean(0)

        inside = basis @ (basis.T @ exact)
        means[residual] = np.asarray(mean(state) - inside), np.asarray(exact - inside)
    actual, outside = means[0.0]
    np.testing.assert_allclose(actual, 0, atol=1e-6 * np.abs(exact).max())
    actual, outside = means[0.25]
    slope = (actual * outside).sum() / (outside**2).sum()
    assert slope == pytest.approx(0.25, abs=0.02)


def test_default_residual_is_the_stable_one():
    basis = lambda values, trace: EigenBasis(
        jnp.zeros((100, 4)), jnp.asarray(values), jnp.asarray(trace)
    )
    flat = _stable_residual(basis([1.0] * 4, 100.0), 100, 4, 8)
    assert flat == pytest.approx(8 / (8**0.5 + 96**0.5) ** 2)
    decaying = _stable_residual(basis([100.0, 10.0, 1.0, 0.1], 112.0), 100, 4, 8)
    assert decaying == pytest.approx(8 / (8 + 96))
    exhausted = _stable_residual(basis([4.0, 3.0, 2.0, 1.0], 10.0), 100, 4, 8)
    assert exhausted == pytest.approx(8 / (8 + 96))
    # The tail is bounded by the rest of the trace, too.
    short = _stable_residual(basis([1.0] * 4, 4.1), 100, 4, 8)
    assert short == pytest.approx(8 / (8 + 96))


def test_same_key_same_result_other_key_another():
    case = one_layer()
    backprop = dsbp_jax.spectral_backprop(case.loss, 3, random=2)
    init, step = jax.jit(backprop.init), jax.jit(backprop.value_and_grad)
    runs = []
    for seed in (0, 0, 1):
        state = init(case.params, case.x, key=jax.random.key(seed))
        _, first, state = step(case.params, state, case.x)
        _, second, _ = step(case.params, state, case.x)
        runs.append((first["w"], second["w"]))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0][0], runs[2][0])
    assert not np.array_equal(runs[0][0], runs[0][1])


def test_aux_and_dtypes():
    case = mlp()
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), case.params)
    loss = lambda params, x: (case.loss(params, x), {"logits": x})
    backprop = dsbp_jax.spectral_backprop(loss, 4, random=2, has_aux=True)
    x = case.x.astype(jnp.bfloat16)
    state = jax.jit(backprop.init)(params, x, key=KEY)
    (value, aux), grads, state = jax.jit(backprop.value_and_grad)(params, state, x)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(aux["logits"], x)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
    assert dsbp_jax.bases(state)["a"].vectors.dtype == jnp.float32


@pytest.mark.slow
def test_vmap_over_seeds_refreshes_in_turn():
    case = one_layer()
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=2)
    stack = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), case.params)
    keys = jax.random.split(KEY, 2)
    init = jax.vmap(lambda p, key: backprop.init(p, case.x, key=key))
    states = jax.jit(init)(stack, keys)
    step = jax.vmap(backprop.value_and_grad, in_axes=(0, 0, None))
    _, grads, _ = jax.jit(step)(stack, states, case.x)
    one = jax.tree.map(lambda leaf: leaf[1], (stack, states))
    _, wanted, _ = jax.jit(backprop.value_and_grad)(*one, case.x)
    close(jax.tree.map(lambda leaf: leaf[1], grads), wanted, 1e-5)


def test_rank_of_a_layer_or_more_and_few_rows_keep_the_exact_gradient():
    case = mlp()
    exact = jax.jit(jax.grad(case.loss))(case.params, case.x)
    for rank, rows in ((16, 64), (6, 5)):
        x = case.x[:rows]
        backprop = dsbp_jax.spectral_backprop(case.loss, rank)
        state = backprop.init(case.params, x, key=KEY)
        assert not vectors(*state.columns)
        _, grads, _ = jax.jit(backprop.value_and_grad)(case.params, state, x)
        close(grads, exact if rows == 64 else jax.grad(case.loss)(case.params, x), 1e-6)
    report = dsbp_jax.explain(case.loss, case.params, case.x, rank=16)
    assert report["a"].no_sketch == "rank 16 ≥ d_in 12"
    report = dsbp_jax.explain(case.loss, case.params, case.x[:5], rank=6)
    assert report["a"].no_sketch == "would cost more"


def test_a_catch_up_weighs_what_is_outside():
    case = mlp()
    backprop = dsbp_jax.spectral_backprop(case.loss, 4)
    state = sketch_state(case, 4)
    exact = jax.grad(case.loss)(case.params, case.x)
    inside = projected(case, exact, vectors(*state.columns))
    for every in (1, 4):
        value, grads, after = jax.jit(backprop.catch_up)(
            case.params, state, case.x, every=every
        )
        wanted = jax.tree.map(lambda g, p, t=every: p + t * (g - p), exact, inside)
        close(grads, wanted, 1e-5)
        np.testing.assert_allclose(value, case.loss(case.params, case.x), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.columns, state.columns)
    with pytest.raises(ValueError, match="every must be a finite number of at least 1"):
        backprop.catch_up(case.params, state, case.x, every=0)


def test_a_smaller_last_batch_leaves_some_layers_exact():
    """Fewer rows than pay for one layer's sketch, enough for another's."""

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    params = {"a": normal(128, 64) / 11, "b": normal(64, 32, seed=1) / 8}
    backprop = dsbp_jax.spectral_backprop(loss, 8, refresh_every=1)
    case = Case(loss, params, normal(256, 128, seed=2), ("a", "b"))
    state = sketch_state(case, 8)
    exact = jax.grad(loss)(params, case.x[:11])
    _, grads, after = jax.jit(backprop.value_and_grad)(params, state, case.x[:11])
    close(grads["b"], exact["b"])
    assert np.abs(grads["a"] - exact["a"]).max() > 1e-4 * np.abs(exact["a"]).max()
    before, after = (vectors(*s.columns) for s in (state, after))
    np.testing.assert_array_equal(before["b"], after["b"])
    assert not np.array_equal(before["a"], after["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an int of at least 1, got 0"),
        ({"tracking": 9}, "tracking must be an int between 0 and 4, got 9"),
        (
            {"tracking": 2, "refresh_every": 5},
            "tracking must be 0 unless refresh_every=None, got 2",
        ),
        ({"random": -1}, "random must be an int of at least 0, got -1"),
        ({"random": 2, "residual": 1.5}, "residual must be a number in [0, 1]"),
        ({"residual": 0.5}, "residual must be None without random columns"),
        ({"refresh_every": 0}, "refresh_every must be an int of at least 1, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dsbp_jax.spectral_backprop(mlp().loss, **{"rank": 4, **options})


def test_bad_losses():
    case = mlp()
    build = lambda loss: dsbp_jax.spectral_backprop(loss, 4)
    vector = build(lambda params, x: x @ params["a"])
    with pytest.raises(ValueError, match="loss_fn must return a floating-point scalar"):
        vector.init(case.params, case.x, key=KEY)
    whole = build(lambda params, x: (case.loss(params, x), x))
    with pytest.raises(ValueError, match="a pair of it"):
        whole.init(case.params, case.x, key=KEY)
    unused = build(lambda params, x: jnp.mean(x))
    with pytest.raises(ValueError, match="params must hold the weights of a layer"):
        unused.init(case.params, case.x, key=KEY)
    good, state = build(case.loss), sketch_state(case, 4)
    with pytest.raises(ValueError, match="at least 4 rows"):
        good.refresh(case.params, state, case.x[:3])
