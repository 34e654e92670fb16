import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dsbp_jax.linalg import Turn
from tests.layers.models import normal

retractions = pytest.mark.parametrize("retraction", ["exp", "cayley"])
lefts = pytest.mark.parametrize("left", [True, False])
V = jnp.linalg.qr(normal(7, 2))[0]


def dense(y, retraction):
    """The rotation of `VYᵀ − YVᵀ` as a whole matrix, float64."""
    v, y = np.asarray(V, np.float64), np.asarray(y, np.float64)
    a, one = v @ y.T - y @ v.T, np.eye(7)
    if retraction == "exp":
        return scipy.linalg.expm(a)
    return np.linalg.solve(one - a / 2, one + a / 2)


@lefts
@retractions
def test_against_whole_matrices(left, retraction):
    w, y = normal(7, 5, seed=1), 0.4 * normal(7, 2, seed=2)
    turn = Turn(V, left=left)
    found = turn.rotate(w if left else w.T, y, retraction)
    np.testing.assert_allclose(
        found if left else found.T, dense(y, retraction) @ w, atol=2e-6
    )


@lefts
def test_elements_are_the_projected_algebra(left):
    w, g = normal(7, 5, seed=1), normal(7, 5, seed=2)
    y, z = Turn(V, left=left).elements(*((w, g) if left else (w.T, g.T)))
    p, gw = V @ V.T, g @ w.T
    for part, whole, sign in ((y, gw - gw.T, -1), (z, gw + gw.T, 1)):
        a = whole / 2
        expected = p @ a + a @ p - p @ a @ p
        np.testing.assert_allclose(V @ part.T + sign * part @ V.T, expected, atol=1e-5)


@lefts
@retractions
@pytest.mark.parametrize("size", [0.0, 0.5])
def test_derivatives_of_first_and_second_order(left, retraction, size):
    """At no rotation at all too, where the span of Y has no basis to differentiate."""
    w, y = normal(7, 5, seed=1), size * normal(7, 2, seed=2)
    w, towards = (w if left else w.T), normal(7, 2, seed=3)
    turn = Turn(V, left=left)
    loss = lambda y: jnp.sum(jnp.sin(turn.rotate(w, y, retraction)))
    with jax.enable_x64(True):
        to64 = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        wide = Turn(to64(V), left=left)
        wide_loss = lambda y: jnp.sum(
            jnp.sin(wide._rotate_smoothly(to64(w), y, retraction))
        )
        h = 1e-5
        step = lambda t: wide_loss(to64(y) + t * to64(towards))
        slope = (step(h) - step(-h)) / (2 * h)
        bend = (step(1e-4) - 2 * step(0.0) + step(-1e-4)) / 1e-8
    found = jnp.vdot(jax.grad(loss)(y), towards)
    np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-4)
    _, second = jax.jvp(jax.grad(loss), (y,), (towards,))
    np.testing.assert_allclose(jnp.vdot(second, towards), bend, rtol=2e-2, atol=1e-2)


@retractions
def test_batches_and_their_derivatives(retraction):
    v = jnp.asarray(np.linalg.qr(normal(2, 7, 2, seed=5))[0])
    w, y = normal(2, 7, 5), 0.3 * normal(2, 7, 2, seed=1)
    turned = lambda v, w, y: Turn(v, left=True).rotate(w, y, retraction)
    run = jax.jit(turned)
    alone = np.stack([run(*one) for one in zip(v, w, y, strict=True)])
    np.testing.assert_allclose(run(v, w, y), alone, atol=1e-6)
    gradient = jax.grad(lambda y, v, w: turned(v, w, y).sum())
    grads = jax.jit(jax.vmap(gradient))(y, v, w)
    expected = jax.jit(gradient)(y, v, w)
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_group():
    w, y = normal(4, 5), normal(4, 4, seed=1)
    turned = Turn(jnp.eye(4), left=True).rotate(w, y, "exp")
    expected = scipy.linalg.expm(np.asarray(y.T - y, np.float64)) @ w
    np.testing.assert_allclose(turned, expected, atol=5e-6)
