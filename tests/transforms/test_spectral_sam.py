import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView
from tests.layers.models import normal
from tests.transforms.test_sam import PARAMS, close, quadratic

# As a transformation


def run_sam(tx, params=PARAMS, steps=3, wrap=lambda tx: tx):
    tx = wrap(tx)
    state = tx.init(params)
    grad_fn = lambda params, i: jax.grad(quadratic)(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            grad_fn(params, 0), state, params, grad_fn=grad_fn, value=1.0
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.promotes  # optax.contrib.sam
def test_the_full_transform_is_optax_sam():
    ours, _ = run_sam(dsbp_jax.spectral_sam(optax.adam(0.1), 0.3, mode="full"))
    theirs = optax.contrib.sam(
        optax.adam(0.1),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.3)),
        opaque_mode=True,
    )
    drop = lambda tx: optax.GradientTransformationExtraArgs(
        tx.init, lambda u, s, p, *, grad_fn, value: tx.update(u, s, p, grad_fn=grad_fn)
    )
    expected, _ = run_sam(theirs, wrap=drop)
    close(ours, expected, 1e-5)


@pytest.mark.parametrize("source", ["own", "the optimizer's"])
def test_the_spectral_transform_is_the_estimator(source):
    inner = optax.sgd(0.1)
    rank = 3
    if source != "own":
        inner, rank = dsbp_jax.dsbp(0.1, 3, momentum=0.0, residual=0.3), None
    tx = dsbp_jax.spectral_sam(inner, 0.3, rank=rank, refresh_every=1, num_blocks=4)
    _, state = run_sam(tx, steps=2)
    grads = jax.grad(quadratic)(PARAMS)
    grad_fn = lambda params, i: jax.grad(quadratic)(params)
    updates, after = tx.update(grads, state, PARAMS, grad_fn=grad_fn)
    used = dsbp_jax.bases(after if source == "own" else state)
    assert set(used) == {"w"}
    estimate = dsbp_jax.sam_value_and_grad(
        jax.value_and_grad(quadratic), 0.3, mode="spectral", bases=used
    )
    wanted, _ = inner.update(estimate(PARAMS)[1], state.inner, PARAMS)
    close(updates, wanted, 1e-5)


@pytest.mark.slow
def test_the_optimizers_bases_are_found_wherever_they_are():
    labels = {"w": "wide", "b": "plain", "u": "tall"}
    params = {**PARAMS, "u": normal(8, 6, seed=4)}
    inner = optax.partition(
        {
            "wide": dsbp_jax.dsbp(0.1, 2),
            "tall": dsbp_jax.dsbp(0.1, 3),
            "plain": optax.sgd(0.1),
        },
        labels,
    )
    loss_fn = lambda p: quadratic(p) + jnp.sum(p["u"] ** 2 * jnp.arange(1.0, 7.0))
    grads = jax.grad(loss_fn)(params)
    tx = dsbp_jax.spectral_sam(inner, 0.3)
    grad_fn = lambda params, i: jax.grad(loss_fn)(params)
    seen = []
    _, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    tx.update(
        grads,
        state,
        params,
        grad_fn=lambda p, i: (seen.append(p), grad_fn(p, i))[1],
    )
    bases = dsbp_jax.bases(state)
    assert set(bases) == {"w", "u"}
    for name, basis in bases.items():
        step = seen[0][name] - params[name]
        inside = step @ basis.vectors @ basis.vectors.T
        np.testing.assert_allclose(inside, step, atol=1e-5)


def test_the_eigen_transform_finds_the_eigenvector_itself():
    tx = dsbp_jax.spectral_sam(optax.sgd(0.0), 0.3, mode="eigen", refresh_every=2)
    _, state = run_sam(tx, steps=5)
    matrix = jax.jit(jax.hessian(lambda f: quadratic(unravel(f))))
    flat, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    values, vectors = np.linalg.eigh(matrix(flat))
    top = vectors[:, values >= values[-1] - 1e-3]
    assert np.linalg.norm(top.T @ state.hessian.vectors) > 0.99
    assert state.hessian.values[0] == pytest.approx(values[-1], rel=1e-2)


def test_inside_a_chain_and_as_the_adversary_of_optax_sam():
    chained = optax.chain(
        optax.clip_by_global_norm(1e3),
        dsbp_jax.spectral_sam(optax.sgd(0.02), 0.1, rank=3),
    )
    params, _ = run_sam(chained, steps=60)
    assert quadratic(params) < 0.1 * quadratic(PARAMS)
    adversary = optax.chain(
        dsbp_jax.spectral_projection(3), optax.contrib.normalize(), optax.sgd(0.1)
    )
    composed = optax.contrib.sam(
        optax.sgd(0.02), adversary, reset_state=False, opaque_mode=True
    )
    drop = lambda tx: optax.GradientTransformationExtraArgs(
        tx.init, lambda u, s, p, *, grad_fn, value: tx.update(u, s, p, grad_fn=grad_fn)
    )
    params, state = run_sam(composed, steps=60, wrap=drop)
    assert quadratic(params) < 0.1 * quadratic(PARAMS)
    assert dsbp_jax.diagnostics(state)["w"].refreshes == 6


def test_bad_arguments():
    for rho in (-1.0, float("nan"), "big"):
        with pytest.raises(ValueError, match="rho must be a finite number of at least"):
            dsbp_jax.sam_value_and_grad(jax.value_and_grad(jnp.sum), rho)
    with pytest.raises(
        ValueError, match="mode must be one of 'full', 'spectral', 'eigen', got 'half'"
    ):
        dsbp_jax.sam_value_and_grad(jax.value_and_grad(jnp.sum), 0.1, mode="half")


# Labels, and what a perturbation is made of


def ascent(tx, params, grads):
    """What `spectral_sam` adds to the params before it asks for gradients."""

    @jax.jit
    def run(grads, state, params):
        seen = []

        def grad_fn(perturbed, step):
            del step
            seen.append(jax.tree.map(lambda a, b: a - b, perturbed, params))
            return grads

        tx.update(grads, state, params, grad_fn=grad_fn)
        return seen[0]

    return run(grads, tx.init(params), params)


def test_the_optimizers_own_layout_counts():
    """A leaf stored (out, in) and square: the axis is in the label alone."""
    layout = Layout((("w", MatrixView((1,), (0,))),))
    params, g = {"w": jnp.zeros((6, 6))}, jnp.zeros((6, 6)).at[0].set(normal(6))
    g = g + 0.1 * normal(6, 6, seed=2)
    inner = dsbp_jax.dsbp(0.1, 1, layout=layout)
    tx = dsbp_jax.spectral_sam(inner, 0.1)
    # Bases are those of the last step: one step first.
    _, state = inner.update({"w": g}, inner.init(params), params)
    (space,) = dsbp_jax.eigenspaces(state)["w"]
    expected = space.vectors @ (space.vectors.T @ g)  # W is (out, in): rows are outputs
    seen = []
    record = lambda p, i: (seen.append(p["w"]), {"w": g})[1]
    first = tx.init(params)
    tx.update({"w": g}, first._replace(inner=state), params, grad_fn=record)
    cosine = jnp.vdot(seen[0], expected)
    cosine /= jnp.linalg.norm(seen[0]) * jnp.linalg.norm(expected)
    assert cosine > 1 - 1e-5


@pytest.mark.parametrize("optimizer", [dsbp_jax.dsbp(0.1, 2, residual=1.0), "narrow"])
def test_an_optimizer_that_tracks_nothing_is_no_source_of_bases(optimizer):
    params = {"w": normal(6, 4)}
    if optimizer == "narrow":  # every layer is as narrow as the rank
        optimizer = dsbp_jax.dsbp(0.1, 4)
    with pytest.raises(ValueError, match="rank must be an int of at least 1 where the"):
        dsbp_jax.spectral_sam(optimizer, 0.1).init(params)


def test_two_spaces_of_one_leaf_and_side_are_named():
    twice = optax.chain(
        dsbp_jax.track_bases(2), dsbp_jax.track_bases(3), optax.sgd(0.1)
    )
    tx = dsbp_jax.spectral_sam(twice, 0.1)
    params = {"w": normal(6, 8)}
    with pytest.raises(ValueError, match=r"of 'w' it tracks rank 2 .* and rank 3"):
        ascent(tx, params, params)


def test_a_frozen_leaf_under_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {"w": normal(6, 8), "frozen": normal(4)}
    grads = {"w": normal(6, 8, seed=1), "frozen": None}
    tx = dsbp_jax.spectral_sam(optax.sgd(0.1), 0.1, rank=2)
    expected = ascent(tx, params, grads)
    with jax.set_mesh(mesh):
        put = lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P("x")))
        found = ascent(tx, jax.tree.map(put, params), jax.tree.map(put, grads))
    np.testing.assert_allclose(found["w"], expected["w"], atol=1e-5)
    np.testing.assert_array_equal(found["frozen"], 0)


@pytest.mark.parametrize("mode", ["full", "spectral"])
def test_complex_leaves_count_with_both_parts(mode):
    g = {"c": jax.lax.complex(normal(5), normal(5, seed=1)), "w": normal(6, 8)}
    params = jax.tree.map(jnp.zeros_like, g)
    if mode == "full":
        seen = []
        record = lambda p: (seen.append(p), (0.0, g))[1]
        dsbp_jax.sam_value_and_grad(record, 0.5)(params)
        moved = seen[1]
    else:
        moved = ascent(dsbp_jax.spectral_sam(optax.sgd(0.1), 0.5, rank=2), params, g)
    size = sum(float(jnp.sum(jnp.abs(leaf) ** 2)) for leaf in moved.values())
    np.testing.assert_allclose(size**0.5, 0.5, rtol=1e-5)
    assert moved["c"].dtype == jnp.complex64
    np.testing.assert_allclose(
        moved["c"].real * g["c"].imag, moved["c"].imag * g["c"].real, atol=1e-6
    )


def test_a_run_in_mode_eigen_has_a_finite_state():
    tx = dsbp_jax.spectral_sam(optax.sgd(0.1), 0.1, mode="eigen")
    grad_fn = lambda params, i: jax.grad(quadratic)(params)
    _, state = tx.update(grad_fn(PARAMS, 0), tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
