"""The transfer penalty against the response that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg
from tests.layers.models import normal

X = normal(40, 12) * 0.7 ** np.arange(12, dtype=np.float32)
SOURCE = {"a": normal(12, 8), "b": normal(8, 5, seed=1), "bias": jnp.zeros(5)}


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"]


@functools.cache
def source_bases(rank):
    @jax.jit
    def bases(params, x):
        _, activations = dsbp_jax.capture_activations(model)(params, x)
        return dsbp_jax.activation_bases(activations, rank)

    return bases(SOURCE, X)


@jax.jit
def shifted(scale=0.1):
    return jax.tree.map(lambda w: w + scale * jnp.cos(3 * w), SOURCE)


def test_full_rank_is_the_mean_squared_change_of_the_response():
    """`Σ λᵢ ‖eᵢᵀ(W − W₀)‖²` over all i is `‖X(W − W₀)‖²/n`."""
    penalty = jax.jit(dsbp_jax.spectral_transfer_penalty(0.5, SOURCE, source_bases(12)))
    source, params = jax.tree.map(np.asarray, (SOURCE, shifted()))
    inputs = {"a": np.asarray(X), "b": np.tanh(np.asarray(X) @ source["a"])}
    change = sum(
        np.sum((inputs[name] @ (params[name] - source[name])) ** 2) / len(X)
        for name in inputs
    )
    assert penalty(params) == pytest.approx(0.5 * change, rel=1e-4)
    assert penalty(SOURCE) == 0


def test_the_transform_adds_the_gradient_of_the_penalty():
    bases, params = source_bases(3), shifted()
    grads = jax.tree.map(jnp.sin, params)
    tx = dsbp_jax.add_spectral_transfer(0.5, SOURCE, bases)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    penalty = dsbp_jax.spectral_transfer_penalty(0.5, SOURCE, bases)
    wanted = jax.tree.map(jnp.add, grads, jax.jit(jax.grad(penalty))(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, wanted
    )
    # By the formula, for one leaf.
    e, values = bases["a"].vectors, bases["a"].values
    term = 2 * 0.5 * (e * values) @ (e.T @ (params["a"] - SOURCE["a"]))
    np.testing.assert_allclose(updates["a"], grads["a"] + term, atol=1e-5)


@pytest.mark.promotes  # optax.adam
def test_steps_away_from_the_source_space_leave_its_response():
    bases, params = source_bases(4), dict(SOURCE)
    tx = optax.chain(optax.adam(0.05), dsbp_jax.project_away(bases))
    loss_fn = jax.jit(lambda p: jnp.mean((model(p, normal(30, 12, seed=5)) - 1) ** 2))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    x, before, after = np.asarray(X), np.asarray(SOURCE["a"]), np.asarray(params["a"])
    vectors = np.asarray(bases["a"].vectors)
    kept = x @ vectors @ vectors.T
    np.testing.assert_allclose(kept @ after, kept @ before, atol=1e-5)
    assert loss_fn(params) < loss_fn(SOURCE)
    assert np.abs(x @ (after - before)).max() > 1e-3


def test_energy_protects_the_leading_columns_only():
    vectors = jnp.eye(4, 2)
    basis = linalg.EigenBasis(vectors, jnp.array([9.0, 1.0]), jnp.array(10.0))
    tx = dsbp_jax.project_away({"w": basis}, energy=0.9)
    updates, _ = tx.update({"w": jnp.ones((4, 1))}, tx.init({"w": jnp.ones((4, 1))}))
    np.testing.assert_allclose(updates["w"].ravel(), [0, 1, 1, 1], atol=1e-6)


def test_leaves_of_another_shape_are_free_unless_they_have_a_basis():
    bases = source_bases(3)
    head = {**shifted(), "b": normal(8, 2)}
    with pytest.raises(ValueError, match=r"source_params must have shape \(8, 2\)"):
        dsbp_jax.add_spectral_transfer(0.5, SOURCE, bases).init(head)
    free = {"a": bases["a"]}
    tx = dsbp_jax.add_spectral_transfer(0.5, SOURCE, free)
    grads = jax.tree.map(jnp.ones_like, head)
    updates, _ = jax.jit(tx.update)(grads, tx.init(head), head)
    np.testing.assert_array_equal(updates["b"], grads["b"])


@pytest.mark.slow
def test_bases_of_stacks_and_reused_kernels():
    stacked = {"w": normal(3, 6, 6)}
    step = lambda h, w: (jnp.tanh(h @ w), None)
    fn = dsbp_jax.capture_activations(lambda p, x: jax.lax.scan(step, x, p["w"])[0])
    _, activations = fn(stacked, normal(20, 6))
    bases = dsbp_jax.activation_bases(activations, 2)
    assert bases["w"].vectors.shape == (3, 6, 2)
    rows, count = activations["w"].rows("input")
    dense = np.linalg.eigvalsh(rows[1].T @ rows[1] / count[1])[::-1]
    np.testing.assert_allclose(bases["w"].values[1], dense[:2], rtol=1e-4)


def test_bad_arguments():
    bases = source_bases(3)
    make = dsbp_jax.add_spectral_transfer
    with pytest.raises(ValueError, match="strength must be a finite number"):
        make(-1.0, SOURCE, bases)
    with pytest.raises(ValueError, match="source_bases must hold the basis of at"):
        make(1.0, SOURCE, {})
    with pytest.raises(ValueError, match=r"layout must be a dsbp_jax\.Layout"):
        make(1.0, SOURCE, bases, layout="HWIO")
    with pytest.raises(ValueError, match="params has no entry for 'a'"):
        make(1.0, SOURCE, bases).init({"other": normal(4, 4)})
    with pytest.raises(ValueError, match="source_params has no entry for 'a'"):
        make(1.0, {"b": SOURCE["b"]}, bases).init(SOURCE)
    wrong = {"a": bases["b"]}
    with pytest.raises(ValueError, match=r"source_bases of 'a' must have vectors .*12"):
        make(1.0, SOURCE, wrong).init(SOURCE)
    tx = make(1.0, SOURCE, bases)
    with pytest.raises(ValueError, match="add_spectral_transfer needs params"):
        tx.update(SOURCE, tx.init(SOURCE))
    with pytest.raises(ValueError, match=r"energy must be a number in \(0, 1\]"):
        dsbp_jax.project_away(bases, energy=0.0)
    with pytest.raises(ValueError, match="side must be one of 'input', 'output'"):
        dsbp_jax.activation_bases({}, 3, side="both")


def test_a_basis_that_does_not_fit_protects_nothing_and_is_named():
    params = {"a": normal(4, 3), "b": normal(8, 6)}
    for dim in (7, 6):  # of neither side; of the outputs
        bases = {"a": basis_of(4), "b": basis_of(dim)}
        with pytest.raises(ValueError, match=r"source_bases of 'b' must .*\(8, k\)"):
            dsbp_jax.project_away(bases).init(params)


def test_a_layout_that_is_a_function_of_the_params():
    model = lambda p, x: x @ p["dense"]["kernel"].T
    params, x = {"dense": {"kernel": normal(5, 6)}}, normal(20, 6)
    bases = {"dense/kernel": basis_of(6)}
    of_params = lambda p: dsbp_jax.layout(model, p, x)
    for tx in (
        dsbp_jax.add_spectral_transfer(0.1, params, bases, layout=of_params),
        dsbp_jax.project_away(bases, layout=of_params),
    ):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert updates["dense"]["kernel"].shape == (5, 6)


def test_a_protected_kernel_without_a_gradient():
    params = {"a": normal(4, 3), "bias": jnp.ones(3)}
    tx = dsbp_jax.project_away({"a": basis_of(4)})
    updates, _ = tx.update({"a": None, "bias": jnp.ones(3)}, tx.init(params))
    assert updates["a"] is None


def basis_of(dim):
    vectors = jnp.linalg.qr(normal(dim, 2, seed=dim))[0]
    return linalg.EigenBasis(vectors, jnp.ones(2), jnp.float32(3))
