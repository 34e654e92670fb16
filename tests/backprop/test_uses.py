"""Leaves that a loss uses more than once, in other ways, or without a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dsbp_jax
from dsbp_jax.backprop.columns import vectors
from dsbp_jax.backprop.cost import sketched_sites, thin_uses
from dsbp_jax.backprop.sketch import _with_random
from dsbp_jax.layers import primitives, trace
from dsbp_jax.linalg import extend_basis, init_basis
from tests.backprop.models import (
    Case,
    mean_square,
    projected,
    random_frame,
    sketch_state,
)
from tests.backprop.test_coordinates import shifted
from tests.backprop.test_sketch import close
from tests.layers.models import normal

stop = lax.stop_gradient


@jax.custom_vjp
def tripled(h, w):
    return h @ w


tripled.defvjp(
    lambda h, w: (h @ w, (h, w)),
    lambda res, g: (g @ res[1].T, 3.0 * res[0].T @ g),
)


def square(loss, seed=0):
    """A loss of one kernel `(12, 12)` and a head, with columns for the kernel."""
    params = {"w": normal(12, 12, seed=seed) / 4, "head": normal(12, 1, seed=1)}
    return Case(loss, params, normal(48, 12, seed=2), ("w",))


def head(params, h):
    return mean_square(jnp.tanh(h) @ params["head"])


def tied_the_other_way_round(p, x):
    return head(p, jnp.tanh(x @ p["w"]) @ p["w"].T)


def repeated(p, x):
    return head(p, jnp.tanh(x @ p["w"]) @ p["w"])


def two_passes(p, x):
    f = lambda x: jnp.tanh(x @ p["w"]) @ p["head"]
    return mean_square(f(x) - f(x + jnp.roll(x, 1, 1) / 3))


def penalised(p, x):
    return head(p, x @ p["w"]) + 0.1 * sum(jnp.sum(leaf**2) for leaf in p.values())


def everything(p, x):
    h = tripled(jnp.tanh(x @ p["w"]), p["w"])
    h = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), h, length=2)[0]
    h = jax.checkpoint(lambda h, w: jnp.sin(h @ w.T))(h, p["w"])
    h = lax.cond(x[0, 0] > 9, lambda h: h, lambda h: jnp.cos(h) @ p["w"], h)
    return head(p, h + p["w"][0, :][None]) + jnp.vdot(p["w"], p["w"])


def target_first(p, x):
    """What the later pass aims at is computed first, through the same kernels."""
    f = lambda x: jnp.tanh(x @ p["w"]) @ p["head"]
    goal = stop(f(jnp.roll(x, 1, 1)))
    return mean_square(f(x) - goal)


USES = {
    loss.__name__: loss
    for loss in (
        tied_the_other_way_round,
        repeated,
        two_passes,
        penalised,
        everything,
        target_first,
    )
}
# All products of the leaf that run through the sketch.
SKETCHED = {
    "tied_the_other_way_round": 1,
    "repeated": 2,
    "two_passes": 2,
    "penalised": 1,
    "everything": 3,
    "target_first": 1,
}


@pytest.mark.parametrize("name", USES)
def test_the_whole_gradient_of_a_leaf_is_projected(name, strict_promotion):
    case = square(USES[name])
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    columns = vectors(*state.columns)
    assert set(columns) == {"w"}
    value, grads, _ = jax.jit(backprop.value_and_grad)(case.params, state, case.x)
    wanted_value, exact = jax.jit(jax.value_and_grad(case.loss))(case.params, case.x)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    wanted = projected(case, exact, columns)
    close(grads, wanted, 5e-6)
    assert np.abs(wanted["w"] - exact["w"]).max() > 1e-2 * np.abs(exact["w"]).max()


@pytest.mark.parametrize("name", USES)
def test_steps_and_a_catch_up_are_exact_together(name):
    case, every = square(USES[name]), 4
    backprop = dsbp_jax.spectral_backprop(case.loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    _, sketched, _ = jax.jit(backprop.value_and_grad)(case.params, state, case.x)
    last = jax.jit(backprop.catch_up)(case.params, state, case.x, every=every)[1]
    exact = jax.jit(jax.grad(case.loss))(case.params, case.x)
    total = jax.tree.map(lambda g, c: (every - 1) * g + c, sketched, last)
    close(total, jax.tree.map(lambda g: every * g, exact), 1e-5)


@pytest.mark.parametrize("name", USES)
def test_which_products_run_through_the_sketch(name):
    case = square(USES[name])
    traced = trace(case.loss, case.params, (case.x,), {})
    views = {path: site.view for path, site in sketched_sites(traced, 4).items()}
    assert list(views) == ["w"]
    assert len(thin_uses(traced, views)) == SKETCHED[name]
    report = dsbp_jax.explain(case.loss, case.params, case.x, rank=4)
    names = [site.name for site in traced.sites if site.path == "w"]
    assert sum(not report[use].no_sketch for use in names) == SKETCHED[name]
    for use in names[1:]:
        how = "sketched with the first's"
        if report[use].no_sketch:
            how = "projected once formed"
        if report[use].no_sketch == "no gradient":
            how = "no gradient: its answer only meets stop_gradient"
        assert how in report[use].reason
        assert report[use].reason.startswith("further use: transforms go by the first")


@pytest.mark.parametrize("name", USES)
def test_coordinates_are_differentiated_through_every_use(name, strict_promotion):
    case = square(USES[name])
    training = dsbp_jax.spectral_coordinates(case.loss, 4)
    coords, frame = random_frame(case, 4)
    assert set(frame.kernels) == {"w"}
    coords = shifted(coords, frame)
    value, grads = jax.jit(training.value_and_grad)(coords, frame, case.x)
    explicit = lambda coords: case.loss(training.merge(coords, frame), case.x)
    wanted_value, wanted = jax.jit(jax.value_and_grad(explicit))(coords)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    close(grads, wanted, 2e-5)


def test_windows_and_stacks_used_twice():
    def loss(p, x):
        convolve = lambda h: lax.conv_general_dilated(h, p["conv"], (1,), "SAME")
        h = jnp.tanh(convolve(jnp.sin(convolve(x))))  # NCW, OIW
        h = h.mean(2)
        layer = lambda h, w: (jnp.tanh(h @ w), None)
        h = lax.scan(layer, lax.scan(layer, h, p["stack"])[0], p["stack"])[0]
        return mean_square(h) + jnp.sum(p["conv"] ** 2) + jnp.sum(p["stack"] ** 3)

    params = {"conv": normal(12, 12, 3) / 6, "stack": normal(2, 12, 12) / 4}
    case = Case(loss, params, normal(30, 12, 6, seed=1), ("conv", "stack"))
    backprop = dsbp_jax.spectral_backprop(loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    columns = vectors(*state.columns)
    assert set(columns) == {"conv", "stack"}
    _, grads, _ = jax.jit(backprop.value_and_grad)(params, state, case.x)
    exact = jax.jit(jax.grad(loss))(params, case.x)
    close(grads, projected(case, exact, columns), 5e-6)


def test_random_columns_sketch_every_use_alike():
    case = square(everything)
    backprop = dsbp_jax.spectral_backprop(
        case.loss, 3, random=2, residual=1.0, refresh_every=None
    )
    state = sketch_state(case, 3)
    exact = jax.grad(case.loss)(case.params, case.x)["w"]

    @jax.jit
    def mean(state):
        def draw(state, _):
            _, grads, state = backprop.value_and_grad(case.params, state, case.x)
            return state, grads["w"]

        return lax.scan(draw, state, length=1500)[1]

    draws = np.asarray(mean(state))
    error = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert np.abs(error).max() < 5
    # As BBᵀG has as few dimensions as B, which no exact part would have.
    singular = np.linalg.svd(draws[:20], compute_uv=False)
    assert (singular[:, 5] < 1e-5 * singular[:, 0]).all()
    # In the span of the columns each draw is exact.
    basis = np.asarray(vectors(*state.columns)["w"])
    inside = basis.T @ (draws - exact)
    np.testing.assert_allclose(inside, 0, atol=2e-5 * np.abs(exact).max())


def test_second_derivatives_of_leaves_used_twice():
    """Differentiating `VVᵀG(x)` by x, where G has parts that were projected late."""
    case = square(penalised)
    loss = lambda p, x: penalised(p, x) + tied_the_other_way_round(p, x)
    case = case._replace(loss=loss)
    backprop = dsbp_jax.spectral_backprop(loss, 4, refresh_every=None)
    state = sketch_state(case, 4)
    columns = vectors(*state.columns)

    def inner(params, exact):
        if exact:
            grads = projected(case, jax.grad(loss)(params, case.x), columns)
        else:
            grads = backprop.value_and_grad(params, state, case.x)[1]
        return sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))

    outer = jax.jit(jax.grad(inner), static_argnums=1)
    actual, wanted = (outer(case.params, exact) for exact in (False, True))
    close(actual, wanted, 2e-5)
    direction = jax.tree.map(jnp.cos, case.params)
    along = lambda fn: jax.jit(lambda p, d: jax.jvp(fn, (p,), (d,))[1])(
        case.params, direction
    )
    close(
        along(lambda p: backprop.value_and_grad(p, state, case.x)[1]),
        along(lambda p: projected(case, jax.grad(loss)(p, case.x), columns)),
        1e-5,
    )
    by_value = lambda p: backprop.value_and_grad(p, state, case.x)[0]
    exact = jax.jit(jax.grad(loss))(case.params, case.x)
    close(jax.jit(jax.grad(by_value))(case.params), exact, 1e-5)


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_a_single_use_costs_what_its_products_cost():
    """One product of the kernel's size at the end, per leaf and not per use."""
    width, rows, rank = 96, 160, 8
    params = {"a": normal(width, width), "b": normal(width, width, seed=1)}
    x = normal(rows, width, seed=2)
    full, thin, last = 2 * rows * width**2, 2 * rows * width * rank, 2 * rank * width**2
    single = lambda p, x: jnp.mean(jax.nn.relu(x @ p["a"]) @ p["b"])
    again = lambda p, x: jnp.mean(jax.nn.relu(x @ p["a"]) @ p["a"]) + 0 * p["b"][0, 0]
    # Each use: XB, and (XB)ᵀΔ; each leaf: B times that.
    for loss, leaves in ((single, 2), (again, 1)):
        case = Case(loss, params, x, ("a", "b")[:leaves])
        backprop = dsbp_jax.spectral_backprop(loss, rank, refresh_every=None)
        state = sketch_state(case, rank)
        products = 3 * full + 2 * 2 * thin + leaves * last
        actual = flops(backprop.value_and_grad, params, state, x)
        assert actual == pytest.approx(products, rel=0.03)


def test_a_catch_up_on_few_rows_is_exact_where_the_steps_are():
    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    params = {"a": normal(128, 64) / 11, "b": normal(64, 32, seed=1) / 8}
    backprop = dsbp_jax.spectral_backprop(loss, 8, refresh_every=None)
    case = Case(loss, params, normal(256, 128, seed=2), ("a", "b"))
    state, few = sketch_state(case, 8), case.x[:11]
    _, grads, _ = jax.jit(backprop.value_and_grad)(params, state, few)
    last = jax.jit(backprop.catch_up)(params, state, few, every=4)[1]
    exact = jax.grad(loss)(params, few)
    close(grads["b"], exact["b"], 1e-5)
    close(last["b"], exact["b"], 1e-5)
    total = jax.tree.map(lambda g, c: 3 * g + c, grads, last)
    close(total, jax.tree.map(lambda g: 4 * g, exact), 1e-5)


def test_columns_follow_the_inputs_of_every_use():
    case = square(two_passes)
    # And none of the inputs of a use in the other orientation.
    other = lambda p, x: jnp.sum((9 * x) @ p["w"].T)
    case = case._replace(loss=lambda p, x: two_passes(p, x) + other(p, x))
    backprop = dsbp_jax.spectral_backprop(case.loss, 3, refresh_every=1)
    state = sketch_state(case, 3)
    _, _, state = jax.jit(backprop.value_and_grad)(case.params, state, case.x)
    second = case.x + jnp.roll(case.x, 1, 1) / 3
    total = jnp.vdot(case.x, case.x) + jnp.vdot(second, second)
    found = dsbp_jax.bases(state)["w"].trace
    np.testing.assert_allclose(found, total / (2 * len(case.x)), rtol=1e-4)


def test_a_leaf_whose_uses_carry_no_gradient_stays_whole():
    def loss(p, x):
        goal = stop(jnp.tanh(x @ p["w"]))
        return mean_square(jnp.tanh(x @ p["v"]) - goal) + jnp.sum(p["w"] ** 2)

    params = {"w": normal(12, 12) / 4, "v": normal(12, 12, seed=1) / 4}
    case = Case(loss, params, normal(48, 12, seed=2), ("v",))
    state = sketch_state(case, 4)
    assert set(vectors(*state.columns)) == {"v"}
    backprop = dsbp_jax.spectral_backprop(loss, 4, refresh_every=None)
    _, grads, _ = jax.jit(backprop.value_and_grad)(params, state, case.x)
    close(grads["w"], 2 * params["w"])
    report = dsbp_jax.explain(loss, params, case.x, rank=4)
    assert report["w"].no_sketch == "no gradient"
    assert "no gradient: " in report["w"].reason


# Precision


def test_columns_are_made_at_the_highest_precision():
    basis = init_basis(24, 4, key=jax.random.key(0))

    def precisions(fn, *args):
        jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
        return [
            equation.params["precision"]
            for equation in primitives.equations(jaxpr)
            if equation.primitive.name == "dot_general"
        ]

    random = lambda v: _with_random(v, basis, jax.random.key(1), 3, None)
    for fn, args, least in (
        (random, (basis.vectors,), 2),
        (extend_basis, (basis.vectors, normal(24, 3)), 6),
        (jax.vmap(extend_basis), (basis.vectors[None], normal(1, 24, 3)), 6),
    ):
        found = precisions(fn, *args)
        assert len(found) >= least
        assert set(found) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
