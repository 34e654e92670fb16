"""What is said of a leaf that was lost on the way to a product."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dsbp_jax import explain
from dsbp_jax.layers import primitives, reasons
from tests.layers.models import normal
from tests.layers.traces import equation_of, find

pytestmark = pytest.mark.usefixtures("strict_promotion")

X = normal(5, 4)
SQUARES = {name: normal(4, 4, seed=i) / 2 for i, name in enumerate("ab")}


def in_while(p, x):
    return lax.while_loop(lambda h: jnp.sum(h) < 1, lambda h: h @ p, x)


def in_shard_map(p, x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    product = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    return product(x, p)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (in_while, (4, 4), "inside a while loop"),
        (in_shard_map, (4, 3), "inside a shard_map"),
        (lambda p, x: x @ (p[:, :2] @ p[:2]), (4, 4), "sliced before use"),
        (lambda p, x: x @ (2.0 * p), (4, 4), "used by mul"),
        (lambda p, x: p[x[:, 0].astype(int)], (4, 4), "looked up by index"),
        (lambda p, x: (x @ p[0]) @ p[1], (2, 4, 4), "sliced before use"),
        (lambda p, x: x @ p.astype(int).astype(float), (4, 4), "not floating"),
    ],
)
def test_reasons(model, shape, reason):
    sites, uses = find(model, jnp.ones(shape), X)
    assert not sites
    assert reason in uses[""]


def test_what_is_not_known_is_named():
    entered = equation_of(jax.jit(jnp.sin), X)
    assert reasons.reason_of(entered) == "enters jit, which is not followed"
    assert reasons.reason_of(equation_of(jnp.sin, X)) == "used by sin"


@pytest.mark.parametrize(
    ("rows", "join"),
    [
        (2, lambda p, x: jnp.concatenate([p, x[:2]])),
        (4, lambda p, x: jnp.stack([p, x[:4]])),
    ],
    ids=["concatenate", "stack"],
)
def test_a_leaf_joined_with_data_is_told_to_stay_apart(rows, join):
    p = normal(rows, 4)
    _, uses = find(lambda p, x: jnp.einsum("nd,...dk->...nk", x, join(p, x)), p, X)
    # In jax 0.10.0 `jnp.stack` concatenates.
    *_, equation = jax.make_jaxpr(join)(p, X).jaxpr.eqns
    name = equation.primitive.name
    assert name in primitives.JOINS
    assert uses[""] == (
        f"joined with data ({name}); multiply the parts apart, or store them as one "
        "leaf"
    )


def test_only_matrices_can_be_multiplied_apart():
    matrix, vector = (reasons.joined("used by mul", shape) for shape in ((4, 3), (4,)))
    assert vector == "joined with other arrays, then used by mul"
    assert matrix == f"{vector}; multiply the parts apart, or store them as one leaf"


def test_a_stack_made_for_a_loop_is_told_to_be_stored_as_one():
    def model(p, x):
        stack = jnp.stack([p["a"], p["b"]])
        return lax.scan(lambda h, w: (h @ w, None), x, stack)[0]

    _, uses = find(model, {"a": normal(4, 4), "b": normal(4, 4)}, X)
    assert set(uses.values()) == {
        f"joined with other arrays, then {reasons.STACKED}; multiply the parts apart, "
        "or store them as one leaf"
    }


def test_known_constructs_that_are_not_followed_keep_their_reasons():
    def model(p, x):
        composite = lax.composite(lambda x, w: x @ w, "dsbp.product")
        looped = lambda h: h @ p["b"]
        return lax.while_loop(lambda h: h[0, 0] < -1, looped, composite(x, p["a"]))

    table = explain(model, SQUARES, X)
    assert "enters composite, which is not followed" in table["a"].reason
    assert "inside a while loop" in table["b"].reason
