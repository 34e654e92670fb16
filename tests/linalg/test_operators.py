import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg

KEY = jax.random.key(0)


def dense(operator):
    return np.asarray(jax.jit(operator.matmat)(np.eye(operator.dim, dtype=np.float32)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gram(dtype):
    x = jax.random.normal(KEY, (7, 5), dtype)
    operator = linalg.gram(x)
    expected = np.asarray(x, np.float64).T @ np.asarray(x, np.float64) / 7
    np.testing.assert_allclose(dense(operator), expected, atol=1e-5)
    half = np.asarray(operator.half(jnp.eye(5)))
    np.testing.assert_allclose(half.T @ half, expected, atol=1e-5)
    np.testing.assert_allclose(operator.trace, np.trace(expected), rtol=1e-5)


def test_gram_counts_only_what_it_is_told():
    x = jax.random.normal(KEY, (4, 3))
    padded = jnp.concatenate([x, jnp.zeros((6, 3))])
    operator = linalg.gram(padded, count=4)
    np.testing.assert_allclose(dense(operator), dense(linalg.gram(x)), rtol=1e-5)
    assert np.all(dense(linalg.gram(jnp.zeros((2, 3)), count=0)) == 0)


def loss_fn(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def test_hessian_and_gauss_newton_against_dense():
    params = {"b": jnp.ones(2), "w": jax.random.normal(KEY, (3, 2))}
    x = jax.random.normal(KEY, (4, 3))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    exact = jax.jit(jax.hessian(lambda p: loss_fn(unravel(p), x)))(flat)
    operator = linalg.hessian(loss_fn, params, x)
    np.testing.assert_allclose(dense(operator), exact, atol=1e-4)
    assert operator.trace == 0  # not known, and no NaN in anybody's state

    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    jacobian = jax.jit(jax.jacobian(lambda p: model(unravel(p), x).ravel()))(flat)
    operator = linalg.gauss_newton(lambda y: jnp.sum(y**2), model, params, x)
    np.testing.assert_allclose(dense(operator), 2 * jacobian.T @ jacobian, atol=1e-4)


def test_crosses_jit_without_retracing():
    traces = []

    @jax.jit
    def top(operator):
        traces.append(1)
        return linalg.top_eigenpairs(operator, 1, key=KEY)

    params = {"b": jnp.ones(2), "w": jax.random.normal(KEY, (3, 2))}
    x = jax.random.normal(KEY, (4, 3))
    first = top(linalg.hessian(loss_fn, params, x))
    second = top(linalg.hessian(loss_fn, params, 2 * x))
    assert len(traces) == 1
    assert first.values != second.values


@pytest.mark.promotes  # ravel_pytree
def test_products_in_the_dtype_of_the_params():
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    x = jax.random.normal(KEY, (4, 3)).astype(jnp.bfloat16)
    product = linalg.hessian(loss_fn, params, x).matmat(jnp.eye(8))
    assert product.dtype == jnp.float32
    exact = linalg.hessian(
        loss_fn,
        jax.tree.map(lambda p: p.astype("float32"), params),
        x.astype("float32"),
    )
    np.testing.assert_allclose(product, dense(exact), atol=0.1)


def test_bad_arguments():
    for x in (jnp.ones((0, 3)), jnp.ones(3), jnp.ones((2, 2), jnp.int32)):
        with pytest.raises(ValueError, match="x must be a floating-point array with 2"):
            linalg.gram(x)
    with pytest.raises(ValueError, match="axis must be 0 or 1, got 2"):
        linalg.gram(jnp.ones((2, 2)), axis=2)
    with pytest.raises(ValueError, match="count must be a finite number of at least 0"):
        linalg.gram(jnp.ones((2, 2)), count=-3)


def test_row_gram_is_the_gram_of_the_transpose():
    x = jax.random.normal(KEY, (5, 7))
    rows, columns = linalg.gram(x, axis=0), linalg.gram(x.T)
    np.testing.assert_allclose(dense(rows), dense(columns), atol=1e-5)
    np.testing.assert_allclose(rows.trace, columns.trace, rtol=1e-6)
    half = np.asarray(rows.half(jnp.eye(5)))
    np.testing.assert_allclose(half.T @ half, dense(rows), atol=1e-5)
