import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dsbp_jax.layers.finder import trace
from dsbp_jax.layers.matrix_view import MatrixView
from tests.layers.models import CLOSED_OVER, CLOSURES, meets_data, normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

X = normal(5, 4)


def find(model, params, *args):
    found = trace(model, params, args, {})
    return {site.name: site for site in found.sites}, dict(found.uses)


# Rearranged leaves


@pytest.mark.parametrize(
    ("rearrange", "shape", "view"),
    [
        (lambda w: w, (4, 3), MatrixView((0,), (1,))),
        (lambda w: w.T, (3, 4), MatrixView((1,), (0,))),
        (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), (4, 3), ((0,), (1,))),
        (lambda w: w.reshape(4, 6), (4, 2, 3), ((0,), (1, 2))),
        (lambda w: w.transpose(2, 1, 0).reshape(4, 6), (3, 2, 4), ((2,), (0, 1))),
        (lambda w: w.reshape(2, 2, 3).reshape(4, 3), (4, 3), ((0,), (1,))),
        (lambda w: w[None, :, None, :].squeeze((0, 2)), (4, 3), ((0,), (1,))),
        (lambda w: jnp.squeeze(w, 0), (1, 4, 3), ((1,), (2,))),
        (lambda w: w.reshape(4, 1), (4, 1), ((0,), (1,))),
        (lambda w: lax.stop_gradient(w), (4, 3), ((0,), (1,))),
        (lambda w: lax.optimization_barrier((X, w))[1], (4, 3), ((0,), (1,))),
    ],
)
def test_views_follow_layout_operations(rearrange, shape, view):
    sites, uses = find(lambda p, x: jnp.dot(x, rearrange(p)), jnp.zeros(shape), X)
    (site,) = sites.values()
    assert site.view == (view if isinstance(view, MatrixView) else MatrixView(*view))
    assert not uses


def test_leaf_as_left_operand_and_under_vmap():
    model = lambda p, x: jax.vmap(lambda x: p @ x)(x)
    sites, _ = find(model, jnp.zeros((3, 4)), X)
    assert sites[""].view == MatrixView((1,), (0,))


def test_digits_that_share_an_axis_of_the_leaf():
    def contract_half(p, x):
        return jnp.einsum("bi,ijk->bjk", x, p.reshape(4, 2, 3))

    sites, uses = find(contract_half, jnp.zeros((8, 3)), X)
    assert not sites
    assert uses[""] == "axis 0 of the leaf is split between several roles"


# Uses and loops


def test_every_other_use_is_listed():
    def model(p, x):
        return x @ p["w"] + jnp.sum(p["w"] ** 2), p["w"].T

    found = trace(model, {"w": jnp.zeros((4, 3))}, (X,), {})
    assert [site.name for site in found.sites] == ["w"]
    squared, returned = (use.reason for use in found.uses)
    assert squared.startswith("used by ")
    assert returned == "returned by the function"


def test_uses_are_numbered_and_keyed():
    shared = jax.jit(lambda x, w: x @ w)
    model = lambda p, x: shared(shared(x, p["w"]), p["w"])
    sites, _ = find(model, {"w": jnp.zeros((4, 4))}, X)
    assert list(sites) == ["w", "w#1"]
    assert sites["w"].key != sites["w#1"].key


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


def grouped(p, x):
    return lax.conv_general_dilated(
        x[:, None, None, :],
        p,
        (1, 1),
        "SAME",
        feature_group_count=4,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def in_while(p, x):
    return lax.while_loop(lambda h: jnp.sum(h) < 1, lambda h: h @ p, x)


def carried(p, x):
    step = lambda c, _: ((c[0] @ c[1], 0.5 * c[1]), None)
    return lax.scan(step, (x, p), length=2)[0][0]


def last_slice(p, x):
    return x @ lax.scan(lambda c, w: (w, None), jnp.zeros((4, 4)), p)[0]


def in_shard_map(p, x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    product = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    return product(x, p)


def chosen(p, x):
    return x @ lax.cond(jnp.sum(x) > 0, lambda p: p, lambda p: p.T, p)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (grouped, (1, 3, 1, 4), "grouped or depthwise"),
        (in_while, (4, 4), "inside a while loop"),
        (carried, (4, 4), "carried and changed by a loop"),
        (last_slice, (2, 4, 4), "its last slice carried out of a loop"),
        (in_shard_map, (4, 3), "inside a shard_map"),
        (chosen, (4, 4), "chosen by a branch"),
        (lambda p, x: x @ (p[:, :2] @ p[:2]), (4, 4), "sliced before use"),
        (lambda p, x: x @ (p @ p), (4, 4), "parameters or constants only"),
        (lambda p, x: x @ (2.0 * p), (4, 4), "used by mul"),
        (lambda p, x: p[x[:, 0].astype(int)], (4, 4), "looked up by index"),
        (lambda p, x: (x @ p[0]) @ p[1], (2, 4, 4), "sliced before use"),
        (lambda p, x: x @ p.astype(int).astype(float), (4, 4), "not floating"),
        (lambda p, x: x @ p, (4,), "a matrix has both"),
        (lambda p, x: jnp.tensordot(x, p, 0), (4, 3), "a matrix has both"),
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
