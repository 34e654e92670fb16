import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from dsbp_jax.linalg.orthogonal import polish
from tests.layers.models import normal


def products(jaxpr):
    """The precision of every matrix product of a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


BLOCKS = {
    "full rank": normal(12, 3),
    "rank one": normal(12, 1) @ normal(1, 3, seed=1),
    "zero": jnp.zeros((12, 3)),
    "huge": 1e30 * normal(12, 3),
    "tiny": 1e-30 * normal(12, 3),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_columns_are_orthonormal_and_span_the_block(block):
    basis = jnp.linalg.qr(normal(12, 2, seed=3))[0]
    block = block - basis @ (basis.T @ block)
    new = linalg.extend_basis(basis, block)
    both = jnp.concatenate([basis, new], axis=1)
    np.testing.assert_allclose(both.T @ both, jnp.eye(5), atol=2e-6)
    size = jnp.maximum(jnp.abs(block).max(), 1e-37)
    np.testing.assert_allclose(new @ (new.T @ (block / size)), block / size, atol=1e-5)


def test_every_product_is_exact():
    """On an accelerator the default would leave columns orthonormal to 1e-3 only."""
    program = jax.make_jaxpr(linalg.extend_basis)(jnp.eye(12, 2), normal(12, 3))
    found = list(products(program.jaxpr))
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert found
    assert all(precision in (highest, highest[0]) for precision in found)


def test_polishing_squares_the_error():
    columns = jnp.linalg.qr(normal(12, 3))[0]
    rough = columns + 1e-4 * normal(12, 3, seed=1)
    better, close = polish(rough)
    assert close
    error = jnp.abs(better.T @ better - jnp.eye(3)).max()
    assert error < 1e-6 < jnp.abs(rough.T @ rough - jnp.eye(3)).max()
    assert not polish(2 * columns)[1]
    assert not polish(columns.at[0, 0].set(jnp.nan))[1]
