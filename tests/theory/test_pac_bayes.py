"""The bound against its definitions: bisection, dense Gaussians, coverage."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.layers import MatrixView
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.theory import pac_bayes
from dsbp_jax.tracking import Eigenspace

SHAPE = (5, 3)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def entropy(q, p):
    terms = [(q, p), (1 - q, 1 - p)]
    return sum(a * math.log(a / b) if a > 0 else 0.0 for a, b in terms)


def bisected(q, budget):
    low, high = q, 1.0
    for _ in range(200 if budget else 0):
        middle = (low + high) / 2
        if middle < 1 and entropy(q, middle) <= budget:
            low = middle
        else:
            high = middle
    return low


QS = [0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0]
BUDGETS = [0.0, 1e-8, 1e-4, 0.01, 0.3, 2.0, 10.0]


def test_the_inverse_is_that_of_bisection(wide):
    q, c = (x.ravel() for x in np.meshgrid(QS, BUDGETS))
    found = jax.jit(jax.vmap(pac_bayes.kl_inverse))(jnp.asarray(q), jnp.asarray(c))
    wanted = [bisected(*pair) for pair in zip(q, c, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    # Never on the side where it is no bound.
    assert np.all(np.asarray(found) >= np.array(wanted) - 1e-12)


def test_the_inverse_in_float32_is_a_bound_to_rounding():
    q, c = (x.ravel() for x in np.meshgrid(QS, BUDGETS))
    found = jax.jit(jax.vmap(pac_bayes.kl_inverse))(jnp.float32(q), jnp.float32(c))
    wanted = [bisected(*pair) for pair in zip(q, c, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=3e-4)


def test_derivatives_of_the_inverse_are_differences(wide):
    grad = jax.jit(jax.grad(pac_bayes.kl_inverse, (0, 1)))
    for q, c in [(0.1, 0.05), (0.4, 1.0), (0.02, 1e-3)]:
        by_q = (bisected(q + 1e-6, c) - bisected(q - 1e-6, c)) / 2e-6
        by_c = (bisected(q, c + 1e-7) - bisected(q, c - 1e-7)) / 2e-7
        np.testing.assert_allclose(grad(q, c), (by_q, by_c), rtol=1e-5)
    assert np.all(np.isfinite(grad(0.0, 0.1)))
    np.testing.assert_array_equal(grad(0.2, 0.0), (1.0, 0.0))


def space(side="input"):
    dim = SHAPE[side == "output"]
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, 2)))[0]
    basis = EigenBasis(jnp.float32(vectors), jnp.ones(2), jnp.array(3.0))
    return Eigenspace(basis, jnp.array(True), MatrixView((0,), (1,)), side, "given")


def families():
    scales = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    entries = jnp.linspace(-2.0, 0.0, 15).reshape(SHAPE)
    return {
        "isotropic": (pac_bayes.isotropic(), jnp.log(0.4)),
        "diagonal": (pac_bayes.diagonal(), entries),
        "input": (pac_bayes.eigenbasis({"w": space()}), scales),
        "output": (pac_bayes.eigenbasis({"w": space("output")}), scales),
    }


def dense_covariance(name, logs):
    """Of all entries of the kernel, row after row."""
    scales = np.exp(2 * np.asarray(logs, np.float64))
    if name == "isotropic":
        return scales * np.eye(15)
    if name == "diagonal":
        return np.diag(scales.ravel())
    vectors = np.asarray(space(name).vectors, np.float64)
    tail = np.eye(len(vectors)) - vectors @ vectors.T
    own = vectors @ np.diag(scales[:2]) @ vectors.T + scales[2] * tail
    other = np.eye(SHAPE[name == "input"])
    return np.kron(own, other) if name == "input" else np.kron(other, own)


@pytest.mark.parametrize("name", ["isotropic", "diagonal", "input", "output"])
def test_divergence_and_draws_are_those_of_the_dense_gaussian(name):
    family, logs = families()[name]
    mean = {"w": jnp.linspace(-1.0, 1.0, 15).reshape(SHAPE)}
    posterior = pac_bayes.Gaussian(mean, {"w": logs})
    centre = {"w": jnp.full(SHAPE, 0.1)}
    prior = pac_bayes.initial_prior(centre, 0.5)
    covariance = dense_covariance(name, logs)
    apart = np.ravel(mean["w"] - centre["w"])
    wanted = 0.5 * (
        np.trace(covariance) / 0.25
        + apart @ apart / 0.25
        - 15
        + 15 * math.log(0.25)
        - np.linalg.slogdet(covariance)[1]
    )
    np.testing.assert_allclose(family.divergence(posterior, prior), wanted, rtol=1e-5)

    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = jax.jit(jax.vmap(lambda key: family.sample(posterior, key)["w"]))(keys)
    draws = np.asarray(draws, np.float64).reshape(len(keys), 15)
    found = np.cov((draws - np.ravel(mean["w"])).T)
    # Of a sample covariance each entry has this error.
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) * 2 / len(keys))
    assert np.all(np.abs(found - covariance) < 5 * scale)


@pytest.mark.parametrize("name", ["isotropic", "diagonal", "input"])
def test_noise_of_the_response_is_that_of_the_kernel(name):
    family, logs = families()[name]
    posterior = pac_bayes.Gaussian({"w": jnp.ones(SHAPE)}, {"w": logs})
    row = jnp.array([0.3, -1.0, 0.5, 0.0, 2.0])
    outputs = lambda params, x: (x @ params["w"])[:, 1]
    rows = jnp.tile(row, (20_000, 1))
    found = pac_bayes.noisy(outputs, family, posterior, jax.random.key(0), rows)
    covariance = dense_covariance(name, logs)
    weights = np.kron(np.asarray(row, np.float64), [0, 1, 0])
    variance = weights @ covariance @ weights
    found = np.asarray(found, np.float64)
    assert abs(found.mean() - float(row.sum())) < 5 * math.sqrt(variance / len(rows))
    assert abs(found.var() / variance - 1) < 5 * math.sqrt(2 / len(rows))


def test_what_is_no_plain_layer_is_drawn_once_for_all_examples():
    family = pac_bayes.isotropic()
    params = {"w": jnp.zeros((2, 2)), "twice": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    posterior = family.init(params, 1.0)

    def outputs(params, x):
        hidden = x @ params["twice"] @ params["twice"]
        return (x @ params["w"])[:, 0] * 0 + hidden[:, 0] + params["b"][0]

    found = pac_bayes.noisy(
        outputs, family, posterior, jax.random.key(0), jnp.ones((4, 2))
    )
    assert np.ptp(found) == 0
    assert found[0] != 0
    plain = lambda params, x: (x @ params["w"])[:, 0]
    found = pac_bayes.noisy(
        plain, family, posterior, jax.random.key(0), jnp.ones((4, 2))
    )
    assert len(set(found.tolist())) == 4


def threshold(params, batch):
    x, y = batch
    return ((x @ params["w"])[:, 0] > 0).astype(jnp.float32) != y


def errors(params, batch):
    return threshold(params, batch).astype(jnp.float32)


def examples(count, seed=0):
    """Labels that the first feature gives, a tenth of them wrong."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    wrong = rng.random(count) < 0.1
    return jnp.asarray(x), jnp.asarray((x[:, 0] > 0) ^ wrong, jnp.float32)


def certified(**changes):
    family = pac_bayes.isotropic()
    params = {"w": jnp.zeros((4, 1)).at[0].set(1.0)}
    arguments = {
        "posterior": family.init(params, 0.1),
        "prior": pac_bayes.initial_prior({"w": jnp.zeros((4, 1))}, 1.0),
        "indices": range(2000),
        "loss_fn": errors,
        "group": 1,
    } | changes
    loss_fn = arguments.pop("loss_fn")
    posterior, prior = arguments.pop("posterior"), arguments.pop("prior")
    return pac_bayes.certify(
        loss_fn,
        family,
        posterior,
        prior,
        examples(2000),
        key=jax.random.key(0),
        **arguments,
    )


def test_the_certificate_is_above_the_error_and_made_as_it_says():
    found = certified()
    # Errs where the labels are wrong, and where its noise turns an answer.
    fresh, _ = pac_bayes.gibbs_risk(
        errors,
        pac_bayes.isotropic(),
        pac_bayes.isotropic().init({"w": jnp.zeros((4, 1)).at[0].set(1.0)}, 0.1),
        examples(50_000, seed=1),
        key=jax.random.key(1),
        together=5000,
    )
    assert 0.1 < fresh < found.empirical < found.bound < 0.25
    assert found.draws == found.num_examples == 2000
    # σ = 1 and its rounded log are both in the grid; 121 were bounded.
    each = 0.01 - 1 - math.log(0.01)
    np.testing.assert_allclose(found.divergence, 0.5 * (4 * each + 1), rtol=1e-5)
    assert found.choices == pytest.approx(math.log(121))
    sampled = bisected(found.sampled, math.log(2 / 0.005) / 2000)
    np.testing.assert_allclose(found.empirical, sampled, atol=1e-5)
    budget = found.divergence + found.choices + math.log(2 * 2000**0.5 / 0.005)
    np.testing.assert_allclose(found.bound, bisected(sampled, budget / 2000), atol=1e-5)


def test_the_bound_trains_a_posterior():
    family = pac_bayes.eigenbasis({"w": _four()})
    params = {"w": jnp.zeros((4, 1)).at[0].set(1.0)}
    prior = pac_bayes.initial_prior({"w": jnp.zeros((4, 1))}, 1.0)

    def smooth(params, batch):
        x, y = batch
        logits = jnp.concatenate([jnp.zeros_like(x[:, :1]), x @ params["w"]], axis=1)
        return pac_bayes.bounded_cross_entropy(logits, y.astype(jnp.int32))

    objective = pac_bayes.bound_objective(smooth, family, 200)
    groups = jax.tree.map(lambda a: a.reshape(2, 100, *a.shape[1:]), examples(200))

    @jax.jit
    def step(posterior, key):
        value, grads = jax.value_and_grad(objective)(posterior, prior, key, groups)
        return jax.tree.map(lambda p, g: p - g, posterior, grads), value

    posterior, values = family.init(params, 0.05), []
    for key in jax.random.split(jax.random.key(0), 100):
        posterior, value = step(posterior, key)
        values.append(float(value))
    assert np.mean(values[-10:]) < np.mean(values[:10]) - 0.01
    # It is the scales that were too narrow; outside of the head they cost nothing.
    assert np.all(np.asarray(posterior.log_scales["w"]) > math.log(0.05))


def _four():
    basis = EigenBasis(jnp.eye(4, 1), jnp.ones(1), jnp.array(4.0))
    return Eigenspace(basis, jnp.array(True), MatrixView((0,), (1,)), "input", "given")


def with_scale(value):
    params = {"w": jnp.zeros((4, 1))}
    return pac_bayes.Gaussian(params, {"w": jnp.float32(value)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_fn": lambda params, batch: 2 * errors(params, batch)},
            r"loss_fn must return losses in \[0, 1\], got 0 to 2",
        ),
        (
            {"loss_fn": lambda params, batch: jnp.mean(errors(params, batch))},
            "loss_fn must return one loss for each of 1 examples",
        ),
        ({"posterior": with_scale(-np.inf)}, "posterior must have deviations above 0"),
        (
            {
                "prior": pac_bayes.learned_prior(
                    {"w": jnp.zeros((4, 1))}, 1.0, [7, 5000]
                )
            },
            "examples must be held out.*got 1 that it saw",
        ),
        (
            {"prior": pac_bayes.initial_prior({"w": jnp.zeros((4, 1))}, 1e-6)},
            "prior must have log σ from -10 to 2",
        ),
        ({"indices": range(5)}, "indices must be one number for each of the 2000"),
        ({"confidence": 1.0}, "confidence must be below 1"),
        ({"group": 3}, "group must divide the 2000 examples, got 3"),
    ],
)
def test_what_the_bound_cannot_hold_for_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        certified(**changes)


def test_bad_scales_and_priors_are_refused():
    params = {"w": jnp.zeros(2)}
    for make in (
        functools.partial(pac_bayes.isotropic().init, params),
        functools.partial(pac_bayes.diagonal().init, params),
        functools.partial(pac_bayes.initial_prior, params),
    ):
        with pytest.raises(ValueError, match="scale must be a finite number above 0"):
            make(0.0)
    with pytest.raises(ValueError, match="seen must hold the examples"):
        pac_bayes.learned_prior(params, 1.0, [])
    with pytest.raises(ValueError, match="num_examples must be an int of at least 8"):
        pac_bayes.risk_bound(0.1, 1.0, 5, delta=0.01)


def test_bounds_hold_as_often_as_they_say():
    # Of a coin: q̂ of n tosses, at 90 %; the inverse is a bound on its chance.
    rng = np.random.default_rng(0)
    tosses = rng.binomial(200, 0.2, size=2000) / 200
    budget = math.log(2 / 0.1) / 200
    bounds = jax.jit(jax.vmap(pac_bayes.kl_inverse, (0, None)))(
        jnp.float32(tosses), budget
    )
    assert np.mean(np.asarray(bounds) < 0.2) < 0.1
