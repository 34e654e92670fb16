import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.layers import LayerActivations
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking.eigenspace import energy_mask
from tests.marks import quick
from tests.transforms import models

gradients = jax.jit(jax.grad(models.loss_fn))

# Enough Krylov blocks for the small leaves to be solved densely: an exact oracle.
EXACT = {"refresh_every": 1, "num_blocks": 12}


def top_projector(c, rank):
    vectors = np.linalg.eigh(np.asarray(c, np.float64))[1][:, ::-1][:, :rank]
    return vectors @ vectors.T


def matrices(name, leaf):
    """The leaf as a list of `(window, d_in, d_out)` stacks, by hand."""
    leaf = np.asarray(leaf, np.float64)
    if name == "dense":
        return [leaf[None]]
    if name == "conv":
        return [leaf.reshape(9, 6, 8)]
    if name == "attention":
        return [leaf.reshape(1, 12, 10)]
    if name == "stacked":
        return [layer[None] for layer in leaf]
    return [leaf.T[None]] if name == "stored (out, in)" else [leaf[None]]


def oracle(name, gradient, rank, side, residual, covariances=None):
    """The definition, written out: `G − (1−κ)(G − PG)`."""
    result = []
    for i, g in enumerate(matrices(name, gradient)):
        c_in, c_out = (
            covariances[i]
            if covariances
            else (np.einsum("wio,wjo->ij", g, g), np.einsum("wio,wip->op", g, g))
        )
        inside = g
        if side in ("input", "both"):
            inside = np.einsum("ij,wjo->wio", top_projector(c_in, rank), inside)
        if side in ("output", "both"):
            inside = np.einsum("wio,op->wip", inside, top_projector(c_out, rank))
        result.append(g - (1 - residual) * (g - inside))
    if name == "stored (out, in)":
        result = [np.swapaxes(matrix, -1, -2) for matrix in result]
    return np.stack(result).reshape(np.shape(gradient))


@pytest.mark.parametrize("residual", quick([0.0, 0.3], [0.3]))
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_gradient_source_against_dense(side, residual):
    tx = dsbp_jax.spectral_projection(
        3, side=side, residual=residual, layout=models.LAYOUT, **EXACT
    )
    params = models.params()
    grads = gradients(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params))
    for name in models.SHAPES:
        expected = oracle(name, grads[name], 3, side, residual)
        np.testing.assert_allclose(updates[name], expected, atol=2e-4)
    np.testing.assert_array_equal(updates["bias"], grads["bias"])
    assert updates["hole"] is None
    assert set(dsbp_jax.bases(state, side="input" if side == "input" else "output"))


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_activation_source_against_dense(side):
    rng = np.random.default_rng(0)
    activations, covariances = {}, {}
    for name, shape in models.SHAPES.items():
        view = models.LAYOUT[name]
        *batch, _, d_in, d_out = view.matrix_shape(shape)
        x, y = (
            rng.standard_normal((*batch, 40, d)) * 0.8 ** np.arange(d)
            for d in (d_in, d_out)
        )
        # Only 30 of the 40 rows were computed; the others are zero.
        x[..., 30:, :], y[..., 30:, :] = 0, 0
        count = jnp.full(batch, 30, jnp.int32)
        activations[name] = LayerActivations(
            jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), count
        )
        x, y = (rows.reshape(-1, 40, rows.shape[-1]) for rows in (x, y))
        covariances[name] = [
            (a.T @ a / 30, b.T @ b / 30) for a, b in zip(x, y, strict=True)
        ]
    tx = dsbp_jax.spectral_projection(
        3, source="activation", side=side, layout=models.LAYOUT, **EXACT
    )
    params = models.params()
    grads = gradients(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), activations=activations)
    for name in models.SHAPES:
        expected = oracle(name, grads[name], 3, side, 0.0, covariances[name])
        np.testing.assert_allclose(updates[name], expected, atol=2e-4)
    held = dsbp_jax.bases(state, side="input" if side == "input" else "output")
    trace = np.trace(covariances["dense"][0][0 if side == "input" else 1])
    np.testing.assert_allclose(held["dense"].trace, trace, rtol=1e-5)


@pytest.mark.parametrize("options", [{"rank": 3, "residual": 1.0}, {"rank": 12}])
@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.promotes  # optax.adam
def test_identity_is_bit_identical_to_the_inner_optimizer(options, side):
    inner = optax.adam(1e-2)
    spectral = optax.chain(dsbp_jax.spectral_projection(side=side, **options), inner)
    params = models.params()

    def train(tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(models.loss_fn)(params), state, params)
            return optax.apply_updates(params, updates), state

        tree, state = params, tx.init(params)
        for _ in range(10):
            tree, state = step(tree, state)
        return tree

    jax.tree.map(np.testing.assert_array_equal, train(spectral), train(inner))


def test_projection_keeps_lossless_gradients():
    """Rows of G lie in span X: the input side loses nothing at rank X."""
    x = jax.random.normal(jax.random.key(0), (4, 12))
    grads = {"kernel": x.T @ jax.random.normal(jax.random.key(1), (4, 10))}
    activations = {"kernel": LayerActivations(x, None, jnp.int32(4))}
    tx = dsbp_jax.spectral_projection(4, source="activation", side="input")
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), activations=activations)
    np.testing.assert_allclose(updates["kernel"], grads["kernel"], atol=1e-4)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_energy_is_the_smallest_sufficient_rank(energy):
    values = np.array([[5.0, 3.0, 1.0, 0.5], [4.0, 0.1, 0.0, 0.0]], np.float32)
    traces = np.array([10.0, 4.1], np.float32)
    basis = EigenBasis(jnp.zeros((2, 6, 4)), jnp.asarray(values), jnp.asarray(traces))
    for mask, row, trace in zip(
        np.asarray(energy_mask(basis, energy)), values, traces, strict=True
    ):
        reached = np.cumsum(row) >= energy * trace * (1 - 1e-5)
        expected = np.argmax(reached) + 1 if reached.any() else 4
        assert mask.sum() == expected
        assert mask[:expected].all()


def test_energy_restricts_the_projection():
    gradient = np.diag([3.0, 2.0, 0.1, 0.05])
    params = {"kernel": jnp.asarray(gradient, jnp.float32)}
    tx = dsbp_jax.spectral_projection(3, energy=0.99, **EXACT)
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    np.testing.assert_allclose(updates["kernel"], np.diag([3.0, 2, 0, 0]), atol=1e-5)


def test_a_layer_without_a_signal_is_not_projected():
    """A random start says nothing about the layer, with or without energy."""
    params = {"kernel": jnp.zeros((6, 5))}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}
    silent = {"kernel": LayerActivations(None, jnp.zeros((8, 5)), jnp.int32(8))}
    for energy in (None, 0.9):
        tx = dsbp_jax.spectral_projection(2, source="activation", energy=energy)
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(grads, state, activations=silent)
        np.testing.assert_array_equal(updates["kernel"], grads["kernel"])
    tx = dsbp_jax.spectral_projection(2)
    updates, _ = tx.update(grads, tx.init(params), refresh=False)
    np.testing.assert_array_equal(updates["kernel"], grads["kernel"])


def test_rank_above_the_rank_of_the_gradient_loses_nothing():
    left, right = (jax.random.normal(jax.random.key(i), (80, 8)) for i in range(2))
    grads = {"kernel": left @ right.T}
    tx = dsbp_jax.spectral_projection(64)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert dsbp_jax.diagnostics(state)["kernel"].failures == 0
    np.testing.assert_allclose(updates["kernel"], grads["kernel"], atol=1e-3)


def test_every_use_of_a_kernel_counts():
    rows = np.random.default_rng(0).standard_normal((2, 8, 5))
    uses = {
        name: LayerActivations(None, jnp.asarray(y, jnp.float32), jnp.int32(8))
        for name, y in zip(("kernel", "kernel#1"), rows, strict=True)
    }
    # Another orientation of a tied weight has no rows in this space.
    uses["kernel#2"] = LayerActivations(None, jnp.ones((8, 6)), jnp.int32(8))
    params = {"kernel": jnp.ones((6, 5))}
    tx = dsbp_jax.spectral_projection(2, source="activation", **EXACT)
    _, state = jax.jit(tx.update)(params, tx.init(params), activations=uses)
    pooled = rows.reshape(16, 5)
    values = np.linalg.eigvalsh(pooled.T @ pooled / 16)[::-1][:2]
    np.testing.assert_allclose(
        dsbp_jax.bases(state)["kernel"].values, values, rtol=1e-4
    )


def test_missing_gradients_pass_through():
    params = {"w": jnp.ones((6, 5)), "v": jnp.ones((6, 5)), "b": jnp.ones(5)}
    grads = {"w": params["w"], "v": None, "b": None}
    for tx in (
        dsbp_jax.spectral_projection(2),
        dsbp_jax.add_spectral_decay(0.1, source="gradient"),
        dsbp_jax.dsbp(0.1, 2, decay=0.1),
    ):
        state = tx.init(params)
        updates, after = tx.update(grads, state, {**params, "call": jax.nn.relu})
        assert updates["v"] is None
        assert updates["b"] is None
        info = dsbp_jax.diagnostics(after)
        assert (info["w"].refreshes, info["v"].refreshes) == (1, 0)


def test_leaves_outside_the_layout_keep_their_gradient():
    layout = dsbp_jax.Layout((("dense", models.LAYOUT["dense"]),))
    params = models.params()
    tx = dsbp_jax.spectral_projection(2, layout=lambda params: layout)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert set(dsbp_jax.bases(state)) == {"dense"}
    for name in ("conv", "attention", "stacked", "bias"):
        np.testing.assert_array_equal(updates[name], params[name])


def test_wide_gradients_keep_dtype_and_track_in_float32():
    params = models.params(jnp.bfloat16)
    tx = dsbp_jax.spectral_projection(2)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert dsbp_jax.bases(state)["dense"].vectors.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an int of at least 1, got 0"),
        ({"rank": -2}, "rank must be an int of at least 1, got -2"),
        ({"rank": 2.5}, "rank must be an int of at least 1, got 2.5"),
        ({"rank": True}, "rank must be an int of at least 1, got True"),
        ({"residual": 1.5}, r"residual must be a number in \[0, 1\], got 1.5"),
        ({"residual": "all"}, r"residual must be a number in \[0, 1\], got 'all'"),
        ({"residual": float("nan")}, r"residual must be a number in \[0, 1\]"),
        ({"source": "hessian"}, "source must be one of 'gradient', 'activation'"),
        ({"side": "left"}, "side must be one of 'input', 'output', 'both'"),
        ({"refresh_every": 0}, "refresh_every must be an int of at least 1, got 0"),
        ({"num_blocks": 1}, "num_blocks must be an int of at least 2, got 1"),
        ({"tolerance": -1.0}, r"tolerance must be a number in \[0, 1\], got -1.0"),
        ({"residual": np.float32(1.5)}, r"residual must be a number in \[0, 1\]"),
        ({"residual": jnp.array(-1.0)}, r"residual must be a number in \[0, 1\]"),
        ({"seed": 1.5}, "seed must be an int of at least 0, got 1.5"),
        ({"layout": "HWIO"}, "layout must be a dsbp_jax.Layout, a function .* 'HWIO'"),
        ({"energy": 0.0}, r"energy must be a number in \(0, 1\], got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dsbp_jax.spectral_projection(**{"rank": 2, **arguments})
    with pytest.raises(ValueError, match=message):
        dsbp_jax.dsbp(0.1, **{"rank": 2, **arguments})


def test_numpy_numbers_are_numbers():
    tx = dsbp_jax.dsbp(
        0.1, np.int64(2), residual=np.float32(0.5), num_blocks=np.int32(2)
    )
    params = {"kernel": jnp.ones((6, 5))}
    tx.update(params, tx.init(params), refresh=np.bool_(True))


def test_bad_activations():
    params = {"dense": {"kernel": jnp.ones((6, 5))}}
    tx = dsbp_jax.spectral_projection(2, source="activation")
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"update needs activations=.*source="):
        tx.update(params, state)
    good = LayerActivations(None, jnp.ones((8, 5)), jnp.int32(8))
    with pytest.raises(
        ValueError,
        match="no entry for 'dense/kernel'; the nearest of its 2 paths is "
        "'params/dense/kernel'",
    ):
        tx.update(
            params, state, activations={"params/dense/kernel": good, "other": good}
        )
    for shape in ((8, 4), (3, 8, 5)):
        wrong = LayerActivations(None, jnp.ones(shape), jnp.ones(shape[:-2], "int32"))
        with pytest.raises(ValueError, match=r"outputs of shape \(n, 5\)"):
            tx.update(params, state, activations={"dense/kernel": wrong})
    inputs_only = LayerActivations(jnp.ones((8, 6)), None, jnp.int32(8))
    with pytest.raises(ValueError, match="activations hold no outputs"):
        tx.update(params, state, activations={"dense/kernel": inputs_only})


def test_layout_of_another_model():
    layout = dsbp_jax.Layout((("params/dense", models.LAYOUT["dense"]),))
    with pytest.raises(ValueError, match="nearest of its 9 paths is 'dense'"):
        dsbp_jax.spectral_projection(2, layout=layout).init(models.params())
