"""Training that owns its steps, folds and decay, against what it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.backprop import sizes, views
from dsbp_jax.backprop.columns import vectors
from tests.backprop.models import mlp, one_layer
from tests.backprop.test_sketch import KEY, close

RATE = optax.cosine_decay_schedule(1e-2, 60)

OPTIMIZERS = {
    "adam": lambda decay: optax.adamw(
        RATE,
        weight_decay=decay,
        mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    ),
    "whitening": lambda decay: dsbp_jax.spectral_muon(RATE, 4, weight_decay=decay),
}


def run(training, state, x, steps):
    """So many steps; the state and the losses."""
    values = []
    for _ in range(steps):
        state, value = training.step(state, x)
        values.append(float(value))
    return state, values


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.promotes  # optax.adam
def test_with_as_many_columns_as_rows_of_a_kernel_it_is_plain_training(name):
    case, make = mlp(), OPTIMIZERS[name]
    training = dsbp_jax.spectral_training(
        case.loss, make(0.0), rank=16, learning_rate=RATE, weight_decay=0.3
    )
    state, _ = run(training, training.init(case.params, case.x, key=KEY), case.x, 50)
    tx = make(0.3)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(
            jax.grad(case.loss)(params, case.x), opt_state, params
        )
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = case.params, tx.init(case.params)
    for _ in range(50):
        params, opt_state = step(params, opt_state)
    close(training.params(state), params, 2e-4)


@pytest.mark.promotes  # optax.cosine_decay_schedule
def test_weights_decay_by_the_schedule_between_folds_too():
    """Steps that do nothing else, and any number of them."""
    case = mlp()
    training = dsbp_jax.spectral_training(
        case.loss,
        optax.sgd(0.0),
        rank=4,
        fold_every=4,
        learning_rate=RATE,
        weight_decay=5.0,
    )
    state = training.init(case.params, case.x, key=KEY)
    left = 1.0
    for number in range(11):
        params = training.params(state)
        for path, leaf in case.params.items():
            factor = left if leaf.ndim > 1 else 1
            close(params[path], leaf * factor, 1e-5)
        left *= 1 - float(RATE(number)) * 5.0
        state, _ = training.step(state, case.x)
    assert left < 0.7


@pytest.fixture(scope="module")
def whitened():
    """Whitening on coordinates, its basis of fewer columns than theirs."""
    case = one_layer()
    tx = lambda frame: optax.partition(
        {
            "held": optax.chain(
                optax.trace(0.9),
                dsbp_jax.spectral_whitening(
                    2, layout=views(frame), sizes=sizes(frame), scale="rms"
                ),
                optax.scale_by_learning_rate(RATE),
            ),
            "whole": optax.adam(RATE),
        },
        lambda tree: {
            path: "held" if path in frame.kernels else "whole" for path in tree
        },
    )
    return case, dsbp_jax.spectral_training(case.loss, tx, rank=6, fold_every=4)


@pytest.mark.parametrize("lost", [1e-8, 1e-6, 0.1])
def test_decay_is_not_lost_where_one_step_takes_less_than_a_rounding(lost):
    kept = dsbp_jax.decay_since(lambda step: 0.5, 2 * lost, 0, 1000)
    assert float(1 - kept) == pytest.approx(-np.expm1(1000 * np.log1p(-lost)), rel=0.01)
    assert float(dsbp_jax.decay_since(2.0, 1.0, 0, 3)) == 0


@pytest.mark.promotes  # optax.adam
def test_killed_and_resumed_is_the_same_bit_for_bit(whitened):
    case, training = whitened
    state = training.init(case.params, case.x, key=KEY)
    state, before = run(training, state, case.x, 6)
    leaves, structure = jax.tree.flatten(state)
    saved = [np.asarray(leaf).copy() for leaf in leaves]
    state, values = run(training, state, case.x, 10)
    again = jax.tree.unflatten(structure, map(jnp.asarray, saved))
    again, same = run(training, again, case.x, 10)
    assert values == same
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert values[-1] < 0.7 * before[0]


@pytest.mark.promotes  # optax.adam
def test_a_basis_of_coordinates_turns_at_the_fold(whitened):
    case, training = whitened
    state, _ = run(training, training.init(case.params, case.x, key=KEY), case.x, 3)
    leading = lambda state: dsbp_jax.bases(state.opt_state)["w"].vectors
    assert leading(state).shape == (6, 2)
    old, basis = (
        np.asarray(leading(state)),
        np.asarray(vectors(*state.frame.columns)["w"]),
    )
    state, _ = training.step(state, case.x)  # refreshes it, then folds
    turn = np.asarray(vectors(*state.frame.columns)["w"]).T @ basis
    wanted, _ = np.linalg.qr(turn @ old)
    found = np.asarray(leading(state))
    np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-5)
    # The basis follows its own updates as well, so near is all that can be asked.
    assert np.linalg.norm(wanted.T @ found) ** 2 > 1.8
    assert np.linalg.norm(old.T @ found) ** 2 < np.linalg.norm(wanted.T @ found) ** 2


@pytest.mark.slow
def test_params_outlive_training_unless_they_are_given_away():
    case = one_layer()
    training = dsbp_jax.spectral_training(case.loss, optax.sgd(0.1), 4, fold_every=1)
    params = jax.tree.map(jnp.copy, case.params)
    state = training.init(params, case.x, key=KEY)
    state, _ = run(training, state, case.x, 2)
    merged = training.params(state)
    training.step(state, case.x)
    kept = jax.tree.leaves((params, merged))
    assert not any(leaf.is_deleted() for leaf in kept)
    training.init(params, case.x, key=KEY, donate=True)
    assert params["w"].is_deleted()


def test_bad_arguments():
    loss = one_layer().loss
    for options, message in (
        ({"fold_every": 0}, "fold_every must be an int of at least 1, got 0"),
        ({"weight_decay": 0.1}, "learning_rate must be that of tx"),
        ({"turns": 0}, "turns must be an int of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dsbp_jax.spectral_training(loss, optax.sgd(0.1), 4, **options)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.adafactor(0.1, min_dim_size_to_factor=2), "what can follow a change"),
        (
            dsbp_jax.spectral_projection(2, source="activation"),
            "a basis of 'w' that follows its activation",
        ),
        (dsbp_jax.spectral_subspace(optax.adam(0.1), 2), "what can follow a change"),
    ],
)
@pytest.mark.promotes
def test_optimizers_that_cannot_live_on_coordinates_are_refused(tx, message):
    case = one_layer()
    training = dsbp_jax.spectral_training(case.loss, tx, 6)
    with pytest.raises(ValueError, match=message):
        training.init(case.params, case.x, key=KEY)


@pytest.mark.slow
@pytest.mark.promotes
def test_one_row_is_a_batch_too():
    case = one_layer()
    training = dsbp_jax.spectral_training(case.loss, optax.adam(1e-2), 4, fold_every=2)
    state = training.init(case.params, case.x[:1], key=KEY)
    assert state.frame.kernels
    state, values = run(training, state, case.x[:1], 5)
    basis = vectors(*state.frame.columns)["w"]
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    assert values[-1] < values[0]
    state, _ = training.step(state, case.x[:9])  # another number of rows, and a fold
    assert np.isfinite(training.params(state)["w"]).all()


# Models of Flax, in ten lines each


def test_linen():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    x, y = jnp.ones((64, 12)), jnp.ones((64, 1))
    loss = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)
    params = model.init(KEY, x)
    training = dsbp_jax.spectral_training(loss, optax.sgd(1e-2), 4, fold_every=2)
    state = training.init(params, x, y, key=KEY)
    assert list(state.frame.kernels) == ["params/layers_0/kernel"]
    for _ in range(3):
        state, value = training.step(state, x, y)
    assert value < loss(params, x, y)
    assert loss(training.params(state), x, y) < value


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(
        nnx.Linear(12, 16, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(16, 1, rngs=nnx.Rngs(1)),
    )
    x, y = jnp.ones((64, 12)), jnp.ones((64, 1))
    graph, params = nnx.split(model, nnx.Param)
    loss = lambda params, x, y: jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)
    training = dsbp_jax.spectral_training(loss, optax.sgd(1e-2), 4, fold_every=2)
    state = training.init(params, x, y, key=KEY)
    assert list(state.frame.kernels) == ["layers/0/kernel"]
    for _ in range(3):
        state, value = training.step(state, x, y)
    nnx.update(model, training.params(state))
    assert jnp.mean((model(x) - y) ** 2) < value
