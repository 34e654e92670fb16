"""Training in coordinates against the same training with whole kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.backprop.columns import vectors
from tests.backprop.models import CASES, Case, mlp, one_layer, random_frame
from tests.backprop.test_sketch import KEY, close
from tests.layers.models import normal
from tests.marks import quick


def shifted(coords, frame, size=0.1):
    """Coordinates away from zero, so that a wrong sign or transpose shows."""
    move = lambda path, leaf: leaf + size * normal(*leaf.shape, seed=len(path))
    held = dsbp_jax.layers.leaves_by_path(coords)
    return {
        path: move(path, leaf) if path in frame.kernels else leaf
        for path, leaf in held.items()
    }


@pytest.mark.parametrize("name", quick(CASES, ("mlp", "attention", "scanned")))
def test_value_and_gradients_are_those_of_the_merged_kernels(name, strict_promotion):
    """Whatever else the loss does with a leaf: ties it, penalises it, branches."""
    case = CASES[name]()
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    assert set(frame.kernels) == set(case.sketched)
    coords = shifted(coords, frame)
    value, grads = jax.jit(training.value_and_grad)(coords, frame, case.x)
    explicit = lambda coords: case.loss(training.merge(coords, frame), case.x)
    wanted_value, wanted = jax.jit(jax.value_and_grad(explicit))(coords)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    close(grads, wanted, 1e-5)


def test_coordinates_start_at_zero_and_merge_to_the_parameters():
    case = CASES["convolution"]()
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    assert coords["first"].shape == (9, 4, 12)
    assert not coords["first"].any()
    np.testing.assert_array_equal(coords["head"], case.params["head"])
    jax.tree.map(
        np.testing.assert_array_equal, training.merge(coords, frame), case.params
    )


def test_second_derivatives_are_exact():
    case = mlp(jnp.tanh)
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    coords = shifted(coords, frame)
    whole = lambda c: case.loss(training.merge(c, frame), case.x)
    tangent = jax.tree.map(
        lambda c: np.cos(np.arange(c.size, dtype=c.dtype)).reshape(c.shape), coords
    )
    along = lambda fn: jax.jit(lambda c, t: jax.jvp(fn, (c,), (t,))[1])
    actual, wanted = (
        along(gradient)(coords, tangent)
        for gradient in (
            lambda c: training.value_and_grad(c, frame, case.x)[1],
            jax.grad(whole),
        )
    )
    close(actual, wanted, 1e-5)


def test_weight_gradients_are_never_formed():
    """No product of the compiled gradient has the shape of a kernel but W₀ + VS."""
    width, rows = 96, 160
    loss = lambda params, x: jnp.mean(jax.nn.relu(x @ params["a"]) @ params["b"])
    params = {"a": normal(width, width), "b": normal(width, width, seed=1)}
    x = normal(rows, width, seed=2)
    training = dsbp_jax.spectral_coordinates(loss, 8)
    coords, frame = random_frame(Case(loss, params, x, ("a", "b")), 8)
    count = lambda fn, *args: (
        jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
    )
    cheap = count(training.value_and_grad, coords, frame, x)
    plain = count(jax.value_and_grad(loss), params, x)
    full = 2 * rows * width**2
    thin = 8 * (2 * 2 * rows * width + width**2) * 2
    assert plain == pytest.approx(5 * full, rel=0.05)
    assert cheap == pytest.approx(3 * full + thin, rel=0.05)


OPTIMIZERS = {
    "momentum": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.promotes  # optax.adam
def test_training_folds_without_recompiling(name):
    case, tx = one_layer(), OPTIMIZERS[name]
    training = dsbp_jax.spectral_coordinates(case.loss, 6)
    coords, frame = jax.jit(training.init)(case.params, case.x, key=KEY)
    opt_state = tx.init(coords)

    @jax.jit
    def step(coords, frame, opt_state):
        value, grads = training.value_and_grad(coords, frame, case.x)
        updates, opt_state = tx.update(grads, opt_state, coords)
        return optax.apply_updates(coords, updates), opt_state, value

    fold, merge = jax.jit(training.fold), jax.jit(training.merge)
    values = []
    for index in range(24):
        coords, opt_state, value = step(coords, frame, opt_state)
        values.append(float(value))
        if index % 6 == 5:
            before = merge(coords, frame)
            coords, frame, opt_state = fold(coords, frame, opt_state, case.x)
            close(merge(coords, frame), before, 1e-6)
    assert values[-1] < 0.7 * values[0]
    assert step._cache_size() == 1
    assert fold._cache_size() == 1


def test_a_fold_moves_momentum_with_the_basis():
    """Momentum as a direction of W is kept, where both columns span it."""
    case = one_layer()
    tx = optax.sgd(0.1, momentum=0.9)
    training = dsbp_jax.spectral_coordinates(case.loss, 6, tracking=0)
    coords, frame = random_frame(case, 6)
    _, grads = training.value_and_grad(coords, frame, case.x)
    _, opt_state = tx.update(grads, tx.init(coords), coords)
    _, new, moved = jax.jit(training.fold)(coords, frame, opt_state, case.x)
    before, after = (vectors(*f.columns)["w"] for f in (frame, new))
    momentum = before @ opt_state[0].trace["w"]
    close(after @ moved[0].trace["w"], after @ (after.T @ momentum), 1e-5)


@pytest.mark.parametrize("name", ["mlp", "convolution"])
@pytest.mark.promotes  # optax.adam
def test_training_is_that_of_spectral_subspace_on_plain_gradients(name):
    case, tx = CASES[name](), optax.adam(1e-2)
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    subspace = dsbp_jax.spectral_subspace(tx, 4, side="input", layout=frame.layout)
    state = subspace.init(case.params)
    # Only leaves with columns are in the layout, so both know the same.
    same = frame.columns.activation.tracked["input"]
    assert set(state.spectral.tracked["input"]) == set(same)
    state = state._replace(spectral=frame.columns.activation)

    @jax.jit
    def both(coords, opt_state, params, state):
        _, grads = training.value_and_grad(coords, frame, case.x)
        updates, opt_state = tx.update(grads, opt_state, coords)
        coords = optax.apply_updates(coords, updates)
        grads = jax.grad(case.loss)(params, case.x)
        updates, state = subspace.update(grads, state, params, refresh=False)
        return coords, opt_state, optax.apply_updates(params, updates), state

    opt_state, params = tx.init(coords), case.params
    for _ in range(5):
        coords, opt_state, params, state = both(coords, opt_state, params, state)
    moved = jax.tree.map(jnp.subtract, params, case.params)
    merged = jax.tree.map(jnp.subtract, training.merge(coords, frame), case.params)
    close(merged, moved, 2e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(jnp.shape(a), jnp.shape(b)),
        opt_state,
        state.inner,
    )


def test_optimizer_state_is_small():
    params = {"w": jnp.zeros((2048, 2048))}
    loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    training = dsbp_jax.spectral_coordinates(loss, 64)
    coords, _ = jax.eval_shape(lambda x: training.init(params, x, key=KEY), x)
    size = lambda tree: sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(jax.eval_shape(optax.adam(1e-3).init, tree))
    )
    assert size(coords) <= size(params) / 10


def test_weight_decay_shrinks_folded_kernels():
    case = one_layer()
    training = dsbp_jax.spectral_coordinates(case.loss, 4, weight_decay=0.01)
    coords, frame = random_frame(case, 4)
    with pytest.raises(ValueError, match="steps must be the number of steps since"):
        training.fold(coords, frame, (), case.x)
    fold = jax.jit(training.fold)
    coords, frame, _ = fold(coords, frame, (), case.x, steps=10)
    params = training.merge(coords, frame)
    close(params["w"], case.params["w"] * 0.99**10)
    close(params["head"], case.params["head"])


def test_bfloat16_kernels_have_float32_coordinates():
    case = mlp()
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), case.params)
    x = case.x.astype(jnp.bfloat16)
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case._replace(params=params, x=x), 4)
    _, grads = jax.jit(training.value_and_grad)(coords, frame, x)
    assert coords["a"].dtype == grads["a"].dtype == jnp.float32
    assert training.merge(coords, frame)["a"].dtype == jnp.bfloat16
    exact = jax.grad(case.loss)(case.params, case.x)
    basis = vectors(*frame.columns)
    for path in frame.kernels:
        wanted = basis[path].T @ exact[path]
        np.testing.assert_allclose(
            grads[path], wanted, atol=0.05 * np.abs(wanted).max()
        )


def test_aux_is_passed_through():
    case = mlp()
    loss = lambda params, x: (case.loss(params, x), {"x": x})
    training = dsbp_jax.spectral_coordinates(loss, 4, has_aux=True)
    coords, frame = random_frame(case, 4)
    (value, aux), _ = jax.jit(training.value_and_grad)(coords, frame, case.x)
    np.testing.assert_allclose(value, case.loss(case.params, case.x), rtol=1e-6)
    np.testing.assert_array_equal(aux["x"], case.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an int of at least 1, got 0"),
        ({"tracking": 5}, "tracking must be an int between 0 and 4, got 5"),
        ({"weight_decay": -0.1}, "weight_decay must be a number in [0, 1], got -0.1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dsbp_jax.spectral_coordinates(mlp().loss, **{"rank": 4, **options})


def test_bad_losses_and_batches():
    case = one_layer()
    training = dsbp_jax.spectral_coordinates(case.loss, 5, tracking=1)
    coords, frame = random_frame(case, 5)
    _, _, seen = training.value_and_grad(coords, frame, case.x, observe=True)
    for message, call in {
        "turn must be an int between 0 and 0, got 1": lambda: training.fold(
            coords, frame, (), seen, turn=1
        ),
        "what was observed in this turn has no entry for 'w'": lambda: training.fold(
            coords, frame, (), seen._replace(layers={})
        ),
        "coords has no entry for 'w'": lambda: training.value_and_grad(
            {"head": coords["head"]}, frame, case.x
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    vector = dsbp_jax.spectral_coordinates(lambda params, x: x @ params["w"], 4)
    with pytest.raises(ValueError, match="loss_fn must return a floating-point scalar"):
        vector.init(case.params, case.x, key=KEY)
