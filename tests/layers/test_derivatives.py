import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.layers import derivative, with_derivative
from tests.layers.models import doubled, normal, rounded


def equation_of(function, *args):
    """The one call of a rule in a function."""
    (equation,) = jax.make_jaxpr(function)(*args).jaxpr.eqns
    return equation


@pytest.mark.parametrize(
    "function", [rounded, doubled], ids=["custom_vjp", "custom_jvp"]
)
def test_a_rule_is_had_by_differentiating_its_call(function):
    x, w = normal(4, 3), normal(3, 2, seed=1)
    equation = equation_of(function, x, w)
    body = derivative(equation)
    others = [jnp.ones((4, 2))] if function is rounded else [x, w]
    found = jax.core.eval_jaxpr(body.jaxpr, body.consts, x, w, *others)
    if function is rounded:
        wanted = jax.vjp(function, x, w)[1](others[0])
    else:
        wanted = [jax.jvp(function, (x, w), (x, w))[1]]
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.parametrize(
    "function", [rounded, doubled], ids=["custom_vjp", "custom_jvp"]
)
def test_another_function_runs_under_the_rule(function):
    x, w = normal(4, 3), normal(3, 2, seed=1)
    equation = equation_of(function, x, w)
    body = derivative(equation)

    def run(x, w):
        (out,) = with_derivative(
            equation,
            lambda values: [values[0] @ values[1] + 7],
            lambda values, others: jax.core.eval_jaxpr(
                body.jaxpr, body.consts, *values, *others
            ),
            [x, w],
        )
        return out

    np.testing.assert_allclose(run(x, w), x @ w + 7, rtol=1e-6)
    grads = [
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(w[0, 0]) * f(x, w)), (0, 1))(x, w)
        for f in (run, function)
    ]
    np.testing.assert_allclose(grads[0][0], grads[1][0], rtol=1e-5)


def test_what_has_no_derivative_is_none():
    @jax.custom_jvp
    def sign(x):
        return jnp.where(x > 0, 1, 0)

    sign.defjvp(lambda primals, tangents: (sign(*primals), tangents[0]))
    assert derivative(equation_of(sign, normal(3))) is None
