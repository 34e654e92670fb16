"""Adapters against the same model on merged kernels, and starts against dense eigh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.transfer.starts import share_out
from tests.backprop.models import CASES
from tests.backprop.test_sketch import close
from tests.layers.models import normal
from tests.marks import quick

KEY = jax.random.key(5)
X = normal(40, 12) * 0.7 ** np.arange(12, dtype=np.float32)
OTHER = normal(60, 12, seed=3) * 0.7 ** np.arange(12, dtype=np.float32)[::-1]
PARAMS = {"a": normal(12, 8), "b": normal(8, 5, seed=1), "bias": jnp.zeros(5)}


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"]


def bases(rank, x=OTHER):
    _, seen = dsbp_jax.capture_activations(model)(PARAMS, x)
    return dsbp_jax.activation_bases(seen, rank)


def moved(adapters):
    """Adapters away from zero."""
    return jax.tree.map(lambda a: a + 0.1 * normal(*a.shape, seed=a.ndim), adapters)


def projector(columns):
    return np.asarray(columns @ columns.mT)


@pytest.mark.parametrize("name", quick(CASES, ("mlp", "attention", "scanned")))
def test_value_and_gradients_are_those_of_merged_kernels(name, strict_promotion):
    """Whatever the model does with a leaf: convolves, scans, ties, penalises it."""
    case = CASES[name]()
    train = "output" if name in ("attention", "tied") else "both"
    lora = dsbp_jax.spectral_lora(case.loss, 3, start="random", train=train)
    adapters, frame = lora.init(case.params, case.x, key=KEY)
    assert {path for path, view in frame.layout.items()} >= set(case.sketched)
    start = lora.merge(adapters, frame)
    jax.tree.map(np.testing.assert_array_equal, start, case.params)
    adapters = moved(adapters)
    apply = jax.jit(jax.value_and_grad(lora.apply))
    value, grads = apply(adapters, frame, case.x)
    dense = lambda adapters: case.loss(lora.merge(adapters, frame), case.x)
    wanted_value, wanted = jax.jit(jax.value_and_grad(dense))(adapters)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    close(grads, wanted, 1e-5)


@pytest.fixture(scope="module")
def explained():
    lora = dsbp_jax.spectral_lora(model, 3)
    return lora, *lora.init(PARAMS, X, key=KEY)


def test_adapters_start_at_the_model_and_in_the_leading_eigenspace(explained):
    lora, adapters, frame = explained
    np.testing.assert_array_equal(lora.apply(adapters, frame, X), model(PARAMS, X))
    inputs = {"a": X, "b": np.tanh(X @ PARAMS["a"])}
    assert {*adapters} == {*inputs}
    for path, x in inputs.items():
        _, vectors = np.linalg.eigh(np.asarray(x.T @ x, np.float64))
        close(projector(adapters[path].down), projector(vectors[:, -3:]), 1e-4)


def test_merging_keeps_the_outputs(explained):
    lora, adapters, frame = explained
    adapters = moved(adapters)
    kept = model(lora.merge(adapters, frame), X)
    close(jax.jit(lora.apply)(adapters, frame, X), kept, 1e-5)


def test_the_null_start_is_what_is_left_of_the_source():
    source = bases(4)
    lora = dsbp_jax.spectral_lora(
        model, 3, start="null", train="output", source_bases=source
    )
    adapters, frame = lora.init(PARAMS, X, key=KEY)
    inputs = {"a": X, "b": np.tanh(X @ PARAMS["a"])}
    for path, x in inputs.items():
        away = np.eye(x.shape[1]) - projector(source[path].vectors)
        _, vectors = np.linalg.eigh(away @ np.asarray(x.T @ x, np.float64) @ away)
        close(projector(frame.down[path]), projector(vectors[:, -3:]), 1e-4)
        assert adapters[path].down is None
    # Inputs inside of the source's eigenspaces are answered as before.
    inside = OTHER @ projector(source["a"].vectors)
    first = lambda params: inside @ params["a"]
    close(first(lora.merge(moved(adapters), frame)), first(PARAMS), 1e-5)


def test_a_null_start_without_variance_left_is_still_outside():
    source = bases(4, X)
    lora = dsbp_jax.spectral_lora(model, 9, start="null", source_bases=source)
    few = X @ projector(source["a"].vectors)  # nothing outside
    adapters, _ = lora.init(PARAMS, few, key=KEY)
    for path, dim in (("a", 12), ("b", 8)):
        down = adapters[path].down
        assert down.shape == (dim, dim - 4)  # as many as there are
        close(down.T @ down, np.eye(dim - 4, dtype=np.float32), 1e-5)
        assert np.abs(source[path].vectors.T @ down).max() < 1e-5


def test_a_budget_buys_the_columns_that_explain_most():
    shares = {
        path: np.linalg.eigvalsh(np.asarray(x.T @ x, np.float64))[::-1]
        for path, x in (("a", X), ("b", np.tanh(X @ PARAMS["a"])))
    }
    shares = {path: own[:4] / own.sum() for path, own in shares.items()}
    costs = {"a": 20, "b": 13}
    wanted = share_out(shares, costs, 70)
    lora = dsbp_jax.spectral_lora(model, 4, budget=70)
    adapters, _ = lora.init(PARAMS, X, key=KEY)
    assert {path: own.up.shape[0] for path, own in adapters.items()} == wanted
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) <= 70
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) > 70 - 20


@pytest.mark.slow
@pytest.mark.promotes  # optax's adam
def test_whole_leaves_are_trained_and_others_are_not():
    lora = dsbp_jax.spectral_lora(model, 2, whole=("b", "bias"), train="output")
    init = jax.jit(lora.init)
    adapters, frame = init(PARAMS, X, key=KEY)
    tx = optax.adam(1e-2)
    grads = jax.grad(lambda a: jnp.sum(lora.apply(a, frame, X) ** 2))(adapters)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    tuned = lora.merge(optax.apply_updates(adapters, updates), frame)
    changed = {path: bool(jnp.any(tuned[path] != PARAMS[path])) for path in PARAMS}
    assert changed == {"a": True, "b": True, "bias": True}
    assert np.linalg.matrix_rank(tuned["a"] - PARAMS["a"], 1e-5) == 2


@pytest.mark.slow
def test_half_precision_keeps_its_factors_in_float32():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    lora = dsbp_jax.spectral_lora(model, 2)
    adapters, frame = lora.init(half, X.astype(jnp.bfloat16), key=KEY)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"float32"}
    out = lora.apply(moved(adapters), frame, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert lora.merge(adapters, frame)["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an int of at least 1, got 0"),
        ({"start": "pissa"}, "start must be one of 'explained', 'null', 'random'"),
        ({"train": "input"}, "train must be one of 'both', 'output', got 'input'"),
        ({"budget": 0}, "budget must be an int of at least 1"),
        ({"budget": 9, "start": "random"}, "budget must be None with start='random'"),
        ({"start": "null"}, "source_bases must be given with start='null'"),
        ({"source_bases": {}}, "source_bases must be given with start='null'"),
        ({"whole": "head"}, "whole must be a collection of paths, got 'head'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dsbp_jax.spectral_lora(model, **options)


def test_what_does_not_fit_the_model_is_named():
    init = lambda **options: dsbp_jax.spectral_lora(model, **options).init(
        PARAMS, X, key=KEY
    )
    with pytest.raises(ValueError, match="params has no entry for 'head'"):
        init(whole=("head",))
    with pytest.raises(ValueError, match="weights of a layer in fn"):
        init(whole=("a", "b"))
    with pytest.raises(ValueError, match="budget must be at least 13"):
        init(budget=12)
    foreign = {"c": bases(2)["a"]}
    with pytest.raises(ValueError, match="no entry for 'c'"):
        init(start="null", source_bases=foreign)
    wrong = {"b": bases(2)["a"]}
    with pytest.raises(ValueError, match="source_bases"):
        init(start="null", source_bases=wrong)
    with pytest.raises(ValueError, match="weights of a layer in fn"):
        init(start="null", source_bases=bases(12))
    adapters, _ = init(rank=99)
    assert adapters["b"].down.shape == (8, 8)
