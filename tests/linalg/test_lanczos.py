import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from tests.linalg.spectra import DIM, SPECTRA, orthonormality_error, symmetric

pytestmark = pytest.mark.usefixtures("strict_promotion")

lanczos = jax.jit(linalg.lanczos, static_argnums=2)


@pytest.mark.parametrize("num_steps", [1, 40, DIM])
@pytest.mark.parametrize("name", SPECTRA)
def test_identities(name, num_steps):
    c, _ = symmetric(SPECTRA[name])
    start = jax.random.normal(jax.random.key(1), (DIM,))
    result = lanczos(linalg.matrix(jnp.asarray(c, jnp.float32)), start, num_steps)
    q, t = np.asarray(result.vectors, np.float64), np.asarray(result.tridiagonal())
    assert orthonormality_error(q) <= 1e-5
    last = np.zeros((DIM, num_steps))
    last[:, -1] = result.residual
    scale = max(SPECTRA[name].max(), 1e-30)
    np.testing.assert_allclose((c @ q - q @ t - last) / scale, 0, atol=2e-5)


def test_finds_extreme_eigenvalues():
    spectrum = np.concatenate([np.linspace(-1, 1, DIM - 2), [5.0, -7.0]])
    c, _ = symmetric(spectrum)
    start = jnp.ones(DIM)
    result = lanczos(linalg.matrix(jnp.asarray(c, jnp.float32)), start, 40)
    ritz = np.linalg.eigvalsh(np.asarray(result.tridiagonal()))
    np.testing.assert_allclose([ritz[0], ritz[-1]], [-7.0, 5.0], atol=1e-4)


def test_zero_start_is_the_first_coordinate():
    result = lanczos(linalg.matrix(jnp.eye(4)), jnp.zeros(4), 2)
    np.testing.assert_allclose(result.vectors[:, 0], [1, 0, 0, 0])


def test_under_vmap():
    starts = jax.random.normal(jax.random.key(0), (3, DIM))
    operator = linalg.matrix(jnp.asarray(symmetric(SPECTRA["step"])[0], jnp.float32))
    run = lambda start: linalg.lanczos(operator, start, 5)
    batch = jax.jit(jax.vmap(run))(starts)
    for i in range(3):
        single = jax.jit(run)(starts[i])
        np.testing.assert_allclose(batch.alphas[i], single.alphas, atol=1e-4)


def test_bad_arguments():
    operator = linalg.matrix(jnp.eye(4))
    with pytest.raises(ValueError, match=r"start must have shape \(4,\)"):
        linalg.lanczos(operator, jnp.ones(3), 2)
    for num_steps in (0, 5, 2.0):
        with pytest.raises(ValueError, match="num_steps must be an int between 1"):
            linalg.lanczos(operator, jnp.ones(4), num_steps)


@pytest.mark.parametrize("exponent", [-22, 22])
def test_extreme_scales(exponent):
    c, _ = symmetric(SPECTRA["decaying"])
    operator = linalg.matrix(jnp.asarray(c * 10.0**exponent, jnp.float32))
    start = jax.random.normal(jax.random.key(1), (DIM,)) * 10.0**-exponent
    result = lanczos(operator, start, 40)
    assert orthonormality_error(result.vectors) <= 1e-5
    ritz = np.linalg.eigvalsh(np.asarray(result.tridiagonal(), np.float64))
    np.testing.assert_allclose(ritz[-1] / 10.0**exponent, 1.0, rtol=1e-4)
