"""The arithmetic of sketches, against the products it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax.backprop.cost import (
    other_uses,
    sketch_flops,
    sketched_sites,
    thin_uses,
    why_plain,
)
from dsbp_jax.layers import MatrixView, primitives, trace
from tests.layers.models import normal, rounded
from tests.layers.traces import find

X = normal(32, 6)


def multiply_adds(fn, *shapes):
    """Those of all matrix products of a function."""
    total = 0
    jaxpr = jax.make_jaxpr(fn)(*map(jnp.zeros, shapes)).jaxpr
    for equation in primitives.equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            answer = equation.outvars[0].aval.shape
            total += np.prod([*answer, *(shape[axis] for axis in contracted)])
    return total


def sketched(x, delta, basis):
    return basis @ ((x @ basis).mT @ delta)


@pytest.mark.parametrize(
    ("model", "shape", "batch", "rows"),
    [
        (lambda p, x: x @ p, (6, 5), (), 32),
        (lambda p, x: x @ p.T, (5, 6), (), 32),
        (
            lambda p, x: jnp.einsum("ned,edk->nek", x.reshape(16, 2, 6), p),
            (2, 6, 5),
            (2,),
            16,
        ),
        (
            lambda p, x: lax.scan(lambda h, w: (h, x @ w), 0.0, p)[1],
            (3, 6, 5),
            (3,),
            32,
        ),
        (lambda p, x: lax.map(lambda x: x @ p, x.reshape(4, 8, 6)), (6, 5), (), 32),
    ],
)
def test_flops_are_those_of_the_products(model, shape, batch, rows):
    sites, _ = find(model, jnp.zeros(shape), X)
    x, delta, basis = (*batch, rows, 6), (*batch, rows, 5), (*batch, 6, 2)
    plain = multiply_adds(lambda x, delta: x.mT @ delta, x, delta)
    thin = multiply_adds(sketched, x, delta, basis)
    assert sketch_flops(sites[""], 2) == (plain, thin)


def test_a_strided_window_has_more_inputs_than_responses():
    model = lambda p, x: lax.conv_general_dilated(
        x, p, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    sites, _ = find(model, jnp.zeros((3, 4, 5)), jnp.zeros((2, 8, 4)))
    n_in, n_out, taps, d_in, d_out, q = 16, 8, 3, 4, 5, 2
    assert sketch_flops(sites[""], q) == (
        taps * n_out * d_in * d_out,
        n_in * d_in * q + taps * (n_out * q * d_out + q * d_in * d_out),
    )


def test_a_further_use_shares_the_last_product():
    sites, _ = find(lambda p, x: jnp.tanh(x @ p) @ p, normal(6, 6), X)
    (plain, first), (again, further) = (sketch_flops(s, 2) for s in sites.values())
    assert plain == again
    assert first - further == multiply_adds(lambda b, s: b @ s, (6, 2), (2, 6))


# The rules


def test_no_reason_where_it_pays():
    sites, _ = find(lambda p, x: x @ p, normal(6, 6), X)
    assert why_plain(sites[""], 2) == ""


REASONS = {
    "inside custom_vjp_call": lambda p, x: rounded(x, p["w"]),
    "no gradient": lambda p, x: x @ lax.stop_gradient(p["w"]),
    "part of a fused kernel": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
    "would cost more": lambda p, x: x[:3] @ p["w"],
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    sites, _ = find(REASONS[reason], {"w": normal(6, 6), "v": normal(6, 6)}, X)
    assert why_plain(sites["w"], 2) == reason


def test_where_the_cost_breaks_even():
    """Of a square layer with n rows it pays while 2nq + qd < nd."""
    for rows in range(1, 24):
        sites, _ = find(lambda p, x: x @ p, jnp.zeros((6, 6)), jnp.zeros((rows, 6)))
        assert (why_plain(sites[""], 2) == "") == (2 * rows * 2 + 2 * 6 < rows * 6)


@pytest.mark.parametrize("rank", [6, 9])
def test_a_basis_of_the_whole_input(rank):
    sites, _ = find(lambda p, x: x @ p, normal(6, 6), X)
    assert why_plain(sites[""], rank) == f"rank {rank} ≥ d_in 6"


def test_a_further_use_goes_with_the_first():
    again = lambda p, x: jnp.tanh(x @ p) @ p
    first, further = find(again, normal(6, 6), X)[0].values()
    assert why_plain(further, 2, first) == ""
    assert why_plain(further, 2) == "further use"
    assert why_plain(further, 6, first) == "further use"  # the first is plain, too
    tied = lambda p, x: jnp.tanh(x @ p) @ p.T
    first, further = find(tied, normal(6, 6), X)[0].values()
    assert why_plain(further, 2, first) == "further use"


# All uses of a function


def everything(p, x):
    h = jnp.tanh(x @ p["w"]) @ p["w"] @ p["w"].T
    return jnp.sum(rounded(h, p["w"])) + jnp.sum(h @ p["once"]) + jnp.sum(p["scale"])


def test_uses_that_run_through_a_sketch_and_others():
    params = {"w": normal(6, 6), "once": normal(6, 6, seed=1), "scale": normal(6)}
    traced = trace(everything, params, (X,), {})
    first = sketched_sites(traced, 2)
    assert {path: site.name for path, site in first.items()} == {
        "w": "w",
        "once": "once",
    }
    views = {path: site.view for path, site in first.items()}
    thin = thin_uses(traced, views)
    assert list(thin) == ["w", "w#1", "once"]  # not the transposed one, nor the rule's
    assert other_uses(traced, thin) == {"w", "scale"}
    turned = thin_uses(traced, {"w": MatrixView((1,), (0,))})
    assert list(turned) == ["w#2"]
    assert not sketched_sites(traced, 6)
