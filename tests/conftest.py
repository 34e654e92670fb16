"""Shared settings of the test suite.

Eight host devices stand in for a mesh, and the package itself is held to strict
dtype and rank promotion (third-party code under test is not).
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Threads of a second pool spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


@pytest.fixture
def strict_promotion():
    """Implicit dtype and rank promotion is an error inside the test."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
