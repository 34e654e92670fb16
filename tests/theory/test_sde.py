"""Drift and diffusion against dense expansions, weak errors against known moments."""

import builtins
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.theory import sde
from tests.theory import problems

DIM = 4


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def tensors():
    """Of a quadratic-cubic loss in four parameters."""
    rng = np.random.default_rng(0)
    quadratic = rng.normal(size=(DIM, DIM))
    cubic = rng.normal(size=(DIM, DIM, DIM))
    cubic = sum(cubic.transpose(p) for p in ([0, 1, 2], [1, 2, 0], [2, 0, 1])) / 3
    cubic = (cubic + cubic.transpose(0, 2, 1)) / 2
    return quadratic @ quadratic.T / DIM, cubic, rng.normal(size=(3, DIM))


def cubic_loss(w, tilt):
    h, t, _ = (jnp.asarray(x, w.dtype) for x in tensors())
    return 0.5 * w @ h @ w + jnp.einsum("ijk,i,j,k->", t, w, w, w) / 6 + tilt @ w


def dense_moves(w, rho, order):
    """`g + ρHv + ½ρ²T(v, v)` of each batch, with every derivative formed."""
    h, t, tilts = tensors()
    hessian = h + np.einsum("ijk,k->ij", t, w)
    moves = []
    for tilt in tilts:
        g = h @ w + np.einsum("ijk,j,k->i", t, w, w) / 2 + tilt
        v = g / np.linalg.norm(g)
        terms = [g, rho * hessian @ v, rho**2 / 2 * np.einsum("ijk,j,k->i", t, v, v)]
        moves.append(sum(terms[: order + 1]))
    return np.array(moves)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_drift_and_diffusion_are_the_dense_expansion(wide, order):
    w, tilts = np.array([0.3, -0.2, 0.5, 0.1]), jnp.asarray(tensors()[2])
    equation = sde.modified_equation(
        cubic_loss, sde.sam(0.4), 0.25, order=order, correction=False
    )
    moves = dense_moves(w, 0.4, order)
    drift, diffusion = jax.jit(
        lambda w: (equation.drift(w, tilts), equation.diffusion(w, tilts))
    )(jnp.asarray(w))
    np.testing.assert_allclose(drift, -moves.mean(0), rtol=1e-12)
    covariance = 0.25 * np.cov(moves.T, bias=True)
    np.testing.assert_allclose(diffusion.T @ diffusion, covariance, atol=1e-13)
    # Of a cubic loss the second order is all that there is.
    exact = jax.vmap(equation.exact, (None, 0))(jnp.asarray(w), tilts)
    missed = np.max(np.abs(exact - moves))
    assert missed < 1e-13 if order >= 2 else missed > 1e-2


@pytest.mark.slow
def test_the_term_in_eta_is_half_the_jacobian_times_the_drift(wide):
    w, tilts = jnp.array([0.3, -0.2, 0.5, 0.1]), jnp.asarray(tensors()[2])
    make = functools.partial(sde.modified_equation, cubic_loss, sde.sam(0.4), 0.25)
    plain, corrected = make(order=1, correction=False), make(order=1)
    drift = lambda w: plain.drift(w, tilts)
    dense = jax.jit(jax.jacfwd(drift))(w) @ drift(w)
    np.testing.assert_allclose(
        jax.jit(corrected.drift)(w, tilts), drift(w) - 0.125 * dense, rtol=1e-12
    )
    columns = lambda w: corrected.diffusion(w, tilts)
    turned = jnp.einsum("kij,kj->i", jax.jit(jax.jacfwd(columns))(w), columns(w))
    np.testing.assert_allclose(
        jax.jit(corrected.stratonovich)(w, tilts),
        corrected.drift(w, tilts) - 0.5 * turned,
        rtol=1e-12,
    )


def test_moves_of_each_method_are_those_of_their_matrices(wide):
    start, tilt = {"w": jnp.asarray(problems.START)}, jnp.asarray(problems.TILTS[0])
    vector = np.asarray(problems.bases()["w"].vectors, np.float64)
    inside = vector @ vector.T
    grad = jax.grad(problems.loss_fn)
    rho, outside = 0.3, np.eye(2) - inside
    shares = 4.0**-0.5 * np.array([0.75 + 0.005, 0.25 + 0.005]) ** -0.5
    cases = {
        "sam": (sde.sam(rho), np.eye(2), np.eye(2)),
        "dsbp": (
            sde.dsbp(problems.bases(), rho=rho, residual=0.2),
            inside,
            inside + 0.2 * outside,
        ),
        "whitened": (
            sde.whitened(problems.bases(), rho=rho, residual=0.5),
            inside,
            shares[0] * inside + 0.5 * shares[1] * outside,
        ),
    }
    for name, (method, ascent, move) in cases.items():
        equation = sde.modified_equation(problems.loss_fn, method, 0.1)
        v = ascent @ grad(start, tilt)["w"]
        moved = {"w": start["w"] + rho * v / np.linalg.norm(v)}
        wanted = move @ grad(moved, tilt)["w"]
        found = equation.exact(start, tilt)["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=name)


# Of 1,000 steps at η = 1e-3, or few at larger ones, from the moments of both.
def weak_error(method, eta, order, *, correction=True):
    equation = sde.modified_equation(
        problems.loss_fn, method, eta, order=order, correction=correction
    )
    found = [
        sde.expectations(
            equation,
            {"w": jnp.asarray(problems.START)},
            jnp.asarray(problems.TILTS),
            round(1 / eta),
            problems.moments,
            box=problems.BOX,
            nodes=12,
            of=of,
        )
        for of in ("optimizer", "sde")
    ]
    return np.max(np.abs(found[0] - found[1]))


def test_weak_error_of_sgd_is_of_first_order_and_of_second_with_the_correction(wide):
    for correction, wanted in ((False, 1), (True, 2)):
        coarse, fine = (
            weak_error(sde.sgd(), eta, 0, correction=correction)
            for eta in (0.01, 0.005)
        )
        assert abs(math.log2(coarse / fine) - wanted) < 0.1


@pytest.mark.parametrize("order", [1, 3])
def test_weak_error_falls_with_the_power_of_rho_after_the_last(wide, order):
    large, small = (weak_error(sde.sam(rho), 1e-3, order) for rho in (0.8, 0.4))
    assert abs(math.log2(large / small) - order - 1) < 0.3


def test_moments_of_a_linear_optimizer_are_the_closed_ones(wide):
    # x ← x − ηaᵢx: E xᵐ is a product, and of dx = b̃x dt + √η σx dW an exponential.
    rates, eta, steps = jnp.array([0.5, 2.0]), 0.1, 20
    equation = sde.modified_equation(lambda x, a: 0.5 * a * x**2, sde.sgd(), eta)
    run = functools.partial(
        sde.expectations,
        equation,
        jnp.array(0.8),
        rates,
        steps,
        lambda x: np.concatenate([x, x**2], axis=1),
        box=[(-1, 1)],
        nodes=6,
    )
    factors = 1 - eta * np.asarray(rates)
    wanted = [0.8 * factors.mean() ** steps, 0.64 * (factors**2).mean() ** steps]
    np.testing.assert_allclose(run(of="optimizer"), wanted, rtol=1e-10)
    drift, noise = -1.25 - eta / 2 * 1.25**2, eta * 0.75**2
    exponents = np.array([drift, 2 * drift + noise]) * eta * steps
    np.testing.assert_allclose(run(of="sde"), [0.8, 0.64] * np.exp(exponents))


@pytest.mark.slow
def test_paths_have_the_moments_of_multiplicative_noise():
    pytest.importorskip("diffrax")
    rates, eta, steps = jnp.array([0.0, 2.0]), 0.1, 10
    equation = sde.modified_equation(
        lambda x, a: 0.5 * a * jnp.sum(x**2), sde.sgd(), eta
    )
    paths = sde.sde_paths(
        equation,
        jnp.ones(1),
        rates,
        steps,
        key=jax.random.key(0),
        num_paths=20_000,
        every=steps,
    )
    assert paths.steps.tolist() == [0, steps]
    ends = np.asarray(paths.observed[:, -1, 0], np.float64)
    np.testing.assert_allclose(ends, paths.params[:, 0], rtol=1e-5)
    drift, noise = -1 - eta / 2, eta
    mean = math.exp(drift * eta * steps)
    error = ends.std() / len(ends) ** 0.5
    # Itô's sense: read in Stratonovich's, the mean would be off by 14 errors.
    assert abs(ends.mean() - mean) < 4 * error
    assert mean * math.expm1(noise * eta * steps / 2) > 10 * error
    squares = ends**2
    wanted = math.exp((2 * drift + noise) * eta * steps)
    assert abs(squares.mean() - wanted) < 4 * squares.std() / len(ends) ** 0.5
    assert paths.validity.stiffness < 0.2
    assert paths.validity.remainder == 0


def test_the_optimizer_runs_its_own_steps():
    rates = jnp.array([0.5, 1.5])
    equation = sde.modified_equation(
        lambda x, a: 0.5 * a * jnp.sum(x**2), sde.sgd(), 0.1
    )
    paths = sde.optimizer_paths(
        equation,
        jnp.ones(2),
        rates,
        4,
        key=jax.random.key(1),
        num_paths=3,
        every=2,
        observe=lambda x: x[0],
    )
    assert paths.observed.shape == (3, 3)
    factors = [0.95**i * 0.85 ** (2 - i) for i in range(3)]
    ratios = paths.observed[:, 1:] / paths.observed[:, :-1]
    for ratio in np.ravel(ratios):
        assert min(abs(ratio - factor) for factor in factors) < 1e-6
    np.testing.assert_array_equal(paths.params[:, 0], paths.observed[:, -1])


def test_steps_too_large_for_the_expansion_are_refused():
    pytest.importorskip("diffrax")
    loss_fn = lambda x, a: 0.5 * a * jnp.sum(x**2) + jnp.sum(jnp.sin(4 * x))
    run = lambda method, eta: sde.sde_paths(
        sde.modified_equation(loss_fn, method, eta, order=1),
        jnp.ones(1),
        jnp.ones(2),
        1,
        key=jax.random.key(0),
        num_paths=1,
    )
    with pytest.raises(ValueError, match=r"learning_rate must be small.*at the start"):
        run(sde.sgd(), 0.5)
    with pytest.raises(ValueError, match="rho must be small"):
        run(sde.sam(2.0), 0.01)


def test_leaving_the_expansion_on_the_way_is_said():
    pytest.importorskip("diffrax")
    # Flat where it starts, steep where it ends.
    loss_fn = lambda x, a: a * jnp.sum(-x + jnp.exp(4 * (x - 1)) / 4)
    equation = sde.modified_equation(loss_fn, sde.sgd(), 0.6, correction=False)
    with pytest.warns(UserWarning, match="at the end of a path"):
        sde.sde_paths(
            equation,
            jnp.zeros(1),
            jnp.ones(2),
            2,
            key=jax.random.key(0),
            num_paths=1,
        )


def test_without_diffrax_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "diffrax":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    equation = sde.modified_equation(lambda x, a: a * x**2, sde.sgd(), 0.1)
    with pytest.raises(ImportError, match=r"dsbp-jax\[theory\]"):
        sde.sde_paths(
            equation,
            jnp.array(1.0),
            jnp.ones(1),
            1,
            key=jax.random.key(0),
            num_paths=1,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"order": 4}, "order must be an int between 0 and 3"),
        ({"method": -0.1}, "rho must be a finite number of at least 0"),
    ],
)
def test_bad_equations_are_refused(change, message):
    arguments = {"learning_rate": 0.1, "order": 1, "method": 0.1} | change
    with pytest.raises(ValueError, match=message):
        sde.modified_equation(
            lambda w, x: w,
            sde.sam(arguments["method"]),
            arguments["learning_rate"],
            order=arguments["order"],
        )


def test_bad_batches_steps_and_boxes_are_refused():
    equation = sde.modified_equation(lambda w, x: jnp.sum(w * x), sde.sgd(), 0.1)
    run = functools.partial(
        sde.optimizer_paths, equation, jnp.ones(1), key=jax.random.key(0), num_paths=1
    )
    with pytest.raises(ValueError, match="batches must have one leading axis"):
        run({"x": jnp.ones(2), "y": jnp.ones(3)}, 1)
    with pytest.raises(ValueError, match="every must divide num_steps=3, got 2"):
        run(jnp.ones(1), 3, every=2)
    with pytest.raises(ValueError, match="box must have an interval around"):
        sde.expectations(
            equation, jnp.ones(1), jnp.ones(1), 1, lambda w: w, box=[(-1, 0)]
        )
    with pytest.raises(ValueError, match="loss_fn must return a floating-point scalar"):
        sde.modified_equation(lambda w, x: w, sde.sgd(), 0.1).exact(jnp.ones(2), 0)
