"""Shared settings of the test suite.

Eight host devices stand in for a mesh, and the package itself is held to strict
dtype and rank promotion (third-party code under test is not). Compiling is most of
the suite's time: machine code is not optimised, fusions are emitted in the older way
where jaxlib still has it, which compiles in half the time, a program is compiled in one
piece (in many, for more cores than the two processes leave, costs 7 %), and all
programs, however small, are kept between tests and runs.
"""

import gc
import os
import pathlib

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)

# Threads of a second pool spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from experiments import process

process.compiles_fast()


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache, and looks for garbage more seldom."""
    gc.set_threshold(50_000)
    folder = str(config.cache.mkdir("compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# What the package's own tests live in; those of experiments run whole programs.
STRICT = {
    path.parent.name
    for path in pathlib.Path(__file__).parents[1].glob("dsbp_jax/*/__init__.py")
}


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """The package leans on no implicit promotion; `promotes` marks what else does."""
    folder = request.path.parent.name
    if folder not in STRICT or request.node.get_closest_marker("promotes"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def strict_promotion():
    """Implicit dtype and rank promotion is an error inside the test."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
