import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_dtypes():
    """The package does not lean on implicit promotion of dtypes."""
    with jax.numpy_dtype_promotion("strict"):
        yield
