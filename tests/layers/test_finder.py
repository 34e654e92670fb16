import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dsbp_jax.layers.finder import trace
from dsbp_jax.layers.matrix_view import MatrixView
from tests.layers.models import CLOSED_OVER, CLOSURES, meets_data, normal
from tests.layers.traces import find

pytestmark = pytest.mark.usefixtures("strict_promotion")

X = normal(5, 4)


def test_leaf_as_left_operand_and_under_vmap():
    model = lambda p, x: jax.vmap(lambda x: p @ x)(x)
    sites, _ = find(model, jnp.zeros((3, 4)), X)
    assert sites[""].view == MatrixView((1,), (0,))


# Uses and loops


def test_every_other_use_is_listed():
    def model(p, x):
        return x @ p["w"] + jnp.sum(p["w"] ** 2), p["w"].T

    found = trace(model, {"w": jnp.zeros((4, 3))}, (X,), {})
    assert [site.name for site in found.sites] == ["w"]
    squared, returned = (use.reason for use in found.uses)
    assert squared.startswith("used by ")
    assert returned == "returned by the function"


def test_loops_say_which_leaf_they_stack():
    def model(p, x):
        def body(carry, w):
            h, shared = carry  # carried, but unchanged
            return (h @ w @ shared, shared), w

        (h, _), stack = lax.scan(body, (x, p["shared"]), p["stacked"])
        return lax.scan(lambda h, w: (h @ w.T, None), h, stack)[0]

    params = {"stacked": jnp.zeros((3, 4, 4)), "shared": jnp.zeros((4, 4))}
    sites, uses = find(model, params, X)
    assert not uses
    assert sites["stacked"].view == MatrixView((1,), (2,), (0,))
    assert sites["stacked#1"].view == MatrixView((2,), (1,), (0,))
    assert sites["stacked"].repeats == 1
    assert sites["shared"].view == MatrixView((0,), (1,))
    assert sites["shared"].repeats == 3
    assert sites["shared"].lengths == (3,)


def test_frozen_leaves_are_marked():
    sites, _ = find(lambda p, x: x @ lax.stop_gradient(p), jnp.zeros((4, 3)), X)
    assert sites[""].weight.frozen


def test_abstract_arguments_will_do():
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    sites, _ = find(lambda p, x: x @ p, struct(4, 3), struct(5, 4))
    assert sites[""].inputs.num_rows == 5


# Bodies that hold data of their own


def after(call, p):
    return call(p["a"]) @ p["b"]


SQUARES = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}


@pytest.mark.parametrize("call", CLOSURES.values(), ids=CLOSURES)
def test_data_that_a_body_holds_is_data_after_it(call):
    sites, _ = find(lambda p: after(call, p), SQUARES)
    assert {site.path for site in sites.values()} == {"a", "b"}
    assert sites["b"].inputs.num_rows == 5


def test_a_body_that_meets_no_leaf_may_hold_data():
    # The operand is known from parameters, but is no longer one of them.
    scaled = lambda w: jax.jit(lambda s: CLOSED_OVER * s)(2.0 * w[0, 0])
    assert list(find(lambda p: after(scaled, p), SQUARES)[0]) == ["b"]


def test_a_loop_that_is_not_entered_may_hold_data():
    def loop(w):
        return lax.while_loop(
            lambda h: jnp.sum(h) < 1, lambda h: h + meets_data(w), jnp.zeros((5, 4))
        )

    assert list(find(lambda p: after(loop, p), SQUARES)[0]) == ["b"]


def test_constants_that_data_chooses_are_data():
    def chosen(p, x):
        h = lax.cond(jnp.sum(x) > 0, lambda w: 1.0 + w, lambda w: 2.0 * w, p["a"])
        return h @ p["b"]

    assert list(find(chosen, SQUARES, X)[0]) == ["b"]


@pytest.mark.parametrize(
    "call",
    [
        jax.jit(lambda w: 2.0 * w),
        jax.checkpoint(jnp.sin),
        jax.nn.relu,
        lambda w: lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, w),
        lambda w: lax.scan(lambda c, w: (c, 2.0 * w), 0.0, w[None])[1][0],
    ],
)
def test_bodies_without_data_stay_parameters(call):
    sites, uses = find(lambda p: after(call, p), SQUARES)
    assert not sites
    assert "parameters or constants only" in uses["b"]


# What falls back


def carried(p, x):
    step = lambda c, _: ((c[0] @ c[1], 0.5 * c[1]), None)
    return lax.scan(step, (x, p), length=2)[0][0]


def last_slice(p, x):
    return x @ lax.scan(lambda c, w: (w, None), jnp.zeros((4, 4)), p)[0]


def chosen(p, x):
    return x @ lax.cond(jnp.sum(x) > 0, lambda p: p, lambda p: p.T, p)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (carried, (4, 4), "carried and changed by a loop"),
        (last_slice, (2, 4, 4), "its last slice carried out of a loop"),
        (chosen, (4, 4), "chosen by a branch"),
        (lambda p, x: x @ (p @ p), (4, 4), "parameters or constants only"),
    ],
)
def test_reasons(model, shape, reason):
    sites, uses = find(model, jnp.ones(shape), X)
    assert not sites
    assert reason in uses[""]


def test_rules_with_side_effects_are_not_entered():
    @jax.custom_jvp
    def product(x, w):
        jax.debug.print("{}", x[0, 0])
        return x @ w

    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0]))
    sites, uses = find(lambda p, x: product(x, p), jnp.zeros((4, 4)), X)
    assert not sites
    assert "side effects" in uses[""]
