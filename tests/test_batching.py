"""What stays out of `vmap`'s hands."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from dsbp_jax.batching import one_by_one
from tests.layers.models import normal

# Independent stacks in one program: as one batched call each, their factorisations wait
# for each other on a machine of two cores. Only another process can end such a wait.
STACKS = """
import jax, jax.numpy as jnp
from dsbp_jax.linalg import extend_basis
from dsbp_jax.linalg.rotation import rotation_core
x = jax.random.normal(jax.random.key(0), (8, 128, 128))
extend = jax.vmap(lambda v: extend_basis(jnp.zeros((128, 64)), v[:, :64]))
each = lambda x: (extend(x), rotation_core(x))
run = jax.jit(lambda x: [each(x * i) for i in (1.0, 2.0, 3.0)])
for _ in range(5):
    jax.block_until_ready(run(x / 128))
"""


@pytest.mark.slow
def test_independent_stacks_do_not_wait_for_each_other():
    subprocess.run([sys.executable, "-c", STACKS], check=True, timeout=120)


def test_one_by_one_is_the_function_under_vmap_jit_and_grad():
    factor = one_by_one(jnp.linalg.cholesky)
    x = normal(3, 4, 4)
    x = x @ x.mT + jnp.eye(4)
    wanted = jnp.linalg.cholesky(x)
    np.testing.assert_allclose(jax.jit(jax.vmap(factor))(x), wanted, rtol=1e-5)
    nested = jax.vmap(jax.vmap(factor))(x[None])
    np.testing.assert_allclose(nested[0], wanted, rtol=1e-5)
    loss = lambda function: lambda x: jnp.sum(jnp.sin(function(x)))
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss(factor)))(x),
        jax.vmap(jax.grad(loss(jnp.linalg.cholesky)))(x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_rotations_are_differentiable():
    u, j = jnp.eye(6, 3), normal(3, 3)
    rotated = lambda j: linalg.expm_lowrank_skew(u, j)(jnp.ones((6, 2)))
    loss = jax.jit(lambda j: jnp.sum(rotated(j) ** 3))
    step = 1e-2 * normal(3, 3, seed=1)
    slope = (loss(j + step) - loss(j - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(j), step), slope, rtol=2e-2)
