import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.linalg import EigenBasis
from tests.marks import quick
from tests.transforms import models


def mlp(params, x):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name])
    return x @ params["head"]


def numpy_reference(params, batches, learning_rate, rank, decay):
    """The paper's rule on a tanh MLP, written out densely in float64."""
    params = {name: np.asarray(w, np.float64) for name, w in params.items()}
    names = list(params)
    for x, target in batches:
        inputs, outputs = [np.asarray(x, np.float64)], []
        for name in names:
            outputs.append(inputs[-1] @ params[name])
            inputs.append(np.tanh(outputs[-1]))
        delta = 2 * (outputs[-1] - np.asarray(target, np.float64)) / target.size
        new = {}
        for i in reversed(range(len(names))):
            w, y = params[names[i]], outputs[i]
            gradient = inputs[i].T @ delta
            delta = (delta @ w.T) * (1 - inputs[i] ** 2)
            values, vectors = np.linalg.eigh(y.T @ y / y.shape[0])
            top = vectors[:, ::-1][:, :rank]
            e = top[:, :1]
            new[names[i]] = (
                w
                - learning_rate * gradient @ top @ top.T
                - decay * values[-1] * w @ e @ e.T
            )
        params = {name: new[name] for name in names}
    return params


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_papers_rule_against_a_dense_reference(decay):
    rng = np.random.default_rng(0)
    shapes = {"first": (6, 16), "second": (16, 12), "head": (12, 3)}
    params = {
        name: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }
    batches = [
        (rng.standard_normal((32, 6)), rng.standard_normal((32, 3))) for _ in range(20)
    ]
    rank, learning_rate = 4, 1.0
    tx = dsbp_jax.dsbp(
        learning_rate,
        rank,
        source="activation",
        residual=0.0,
        momentum=0.0,
        decay=decay,
        refresh_every=1,
        num_blocks=4,  # fills these small spaces: solved exactly
    )

    def loss_fn(params, x, target):
        out, activations = dsbp_jax.capture_activations(mlp)(params, x)
        return jnp.mean((out - target) ** 2), activations

    @jax.jit
    def step(params, state, x, target):
        grads, activations = jax.grad(loss_fn, has_aux=True)(params, x, target)
        updates, state = tx.update(grads, state, params, activations=activations)
        return optax.apply_updates(params, updates), state

    expected = numpy_reference(params, batches, learning_rate, rank, decay)
    actual, state = params, tx.init(params)
    for x, target in batches:
        actual, state = step(
            actual, state, jnp.asarray(x, "float32"), jnp.asarray(target, "float32")
        )
    for name in shapes:
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-4)
        moved = np.abs(expected[name] - np.asarray(params[name])).max()
        assert moved > 0.05  # the agreement is not that of two standstills


def train(tx, steps=150):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(models.loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = models.params()
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def test_is_the_chain_of_its_parts():
    ready = dsbp_jax.dsbp(0.05, 3, residual=0.2, momentum=0.8)
    chained = optax.chain(
        dsbp_jax.spectral_projection(3, residual=0.2),
        optax.trace(0.8),
        optax.scale_by_learning_rate(0.05),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        train(ready, 10),
        train(chained, 10),
    )


@pytest.mark.parametrize("side", quick(["input", "output", "both"], ["output"]))
def test_residual_lets_it_converge_to_the_optimum(side):
    tx = dsbp_jax.dsbp(0.1, 3, side=side, residual=0.3, layout=models.LAYOUT)
    assert models.loss_fn(train(tx)) < 1e-3 * models.loss_fn(models.params())


def test_residual_one_without_decay_tracks_nothing():
    tx = dsbp_jax.dsbp(0.1, 3, residual=1.0)
    momentum = optax.sgd(0.1, momentum=0.9)
    jax.tree.map(np.testing.assert_array_equal, train(tx, 5), train(momentum, 5))
    assert dsbp_jax.bases(tx.init(models.params())) == {}


def test_narrow_layers_decay_without_being_projected():
    params = {"kernel": jnp.ones((6, 3))}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (6, 3))}
    tx = dsbp_jax.dsbp(1.0, 8, momentum=0.0, decay=0.1, source="gradient")
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    values, vectors = np.linalg.eigh(grads["kernel"].T @ grads["kernel"])
    e = vectors[:, -1:]
    expected = -grads["kernel"] - 0.1 * values[-1] * params["kernel"] @ e @ e.T
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-4)


def test_spectral_decay_is_the_gradient_of_its_penalty():
    params = models.params()
    rng = np.random.default_rng(0)
    for side in ("input", "output"):
        held = {}
        for name in models.SHAPES:
            shape = models.LAYOUT[name].matrix_shape(models.SHAPES[name])
            *batch, _, d_in, d_out = shape
            dim = d_in if side == "input" else d_out
            q = np.linalg.qr(rng.standard_normal((*batch, dim, 2)))[0]
            values = np.broadcast_to(np.float32([3, 1]), (*batch, 2))
            held[name] = EigenBasis(
                *map(jnp.asarray, (q.astype(np.float32), values, values.sum(-1)))
            )

        def penalty(tree, side=side, held=held):
            total = 0.0
            for name, basis in held.items():
                matrix = models.LAYOUT[name].to_matrix(tree[name])
                if side == "input":
                    matrix = jnp.swapaxes(matrix, -1, -2)
                along = jnp.einsum("...wio,...ok->...wik", matrix, basis.vectors)
                total += 0.5 * jnp.sum(basis.values[..., None, None, :] * along**2)
            return total

        tx = dsbp_jax.add_spectral_decay(
            0.1, side=side, rank=2, layout=models.LAYOUT, bases=held
        )
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
        expected = jax.jit(jax.grad(penalty))(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, 0.1 * b, atol=1e-4),
            updates,
            expected,
        )


@pytest.mark.slow
def test_spectral_decay_tracks_what_it_needs():
    params = models.params()
    tx = dsbp_jax.add_spectral_decay(0.1, source="gradient", layout=models.LAYOUT)
    grads = jax.jit(jax.grad(models.loss_fn))(params)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    assert dsbp_jax.bases(state)["dense"].vectors.shape == (10, 1)
    # Bases of another transform serve as well.
    shared = dsbp_jax.eigenspaces(state)
    updates, after = update(grads, state, params, bases=shared)
    assert dsbp_jax.diagnostics(after)["dense"].refreshes == 1
    assert jnp.abs(updates["dense"] - grads["dense"]).max() > 1e-3


def test_missing_arguments_are_errors():
    params = {"kernel": jnp.ones((6, 5))}
    decay = dsbp_jax.add_spectral_decay(0.1)
    with pytest.raises(ValueError, match="update needs activations="):
        decay.update(params, decay.init(params), params)
    with pytest.raises(ValueError, match="add_spectral_decay needs params"):
        decay.update(params, decay.init(params))
    ready = dsbp_jax.dsbp(0.1, 2, decay=0.1)
    with pytest.raises(ValueError, match="dsbp with decay needs params"):
        ready.update(params, ready.init(params))
    with pytest.raises(ValueError, match="strength must be a finite number of at le"):
        dsbp_jax.add_spectral_decay(-0.1)
    with pytest.raises(ValueError, match="side must be one of 'input', 'output'"):
        dsbp_jax.add_spectral_decay(0.1, side="both")
    with pytest.raises(ValueError, match=r"momentum must be a number in \[0, 1\]"):
        dsbp_jax.dsbp(0.1, momentum=1.1)
    with pytest.raises(ValueError, match="decay must be a finite number of at least 0"):
        dsbp_jax.dsbp(0.1, decay=-1.0)


def test_bases_that_do_not_fit_are_errors():
    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    basis = lambda d, k: EigenBasis(jnp.eye(d, k), jnp.ones(k), jnp.float32(1))
    update = lambda bases, **options: dsbp_jax.add_spectral_decay(
        0.1, bases=bases, **options
    ).update(params, dsbp_jax.SpectralState(jnp.int32(0), {}), params)
    with pytest.raises(ValueError, match="nearest of its 1 paths is 'kernel'"):
        update({"params/kernel": basis(5, 1)})
    with pytest.raises(ValueError, match=r"bases of 'kernel' must have .*\(5, k\)"):
        update({"kernel": basis(6, 1)}, side="output")
    update({"kernel": basis(6, 1)})  # by its dimension one of the inputs
    with pytest.raises(ValueError, match="with k of at least 2"):
        update({"kernel": basis(5, 1)}, rank=2)
    # As under a mask, bases of leaves that are not here do no harm.
    update({"kernel": basis(5, 1), "elsewhere": basis(3, 1)})


def test_injecting_leaves_the_program_as_it_was():
    params = {"kernel": jnp.ones((6, 3))}
    inject = optax.inject_hyperparams(dsbp_jax.dsbp, static_args=dsbp_jax.STATIC_ARGS)
    tx = inject(learning_rate=0.1, rank=8)
    state = tx.init(params)
    assert dsbp_jax.bases(state) == {}
    tx.update(params, state)  # without decay there is no need of params
