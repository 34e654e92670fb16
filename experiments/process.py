"""How a process uses the machine: LAPACK's threads, memory, programs on the disk."""

import ctypes
import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import scipy.linalg  # noqa: F401
import threadpoolctl

# On a CPU, JAX's eigenvalue solver runs in SciPy's OpenBLAS. Its threads wait for one
# another by spinning: on small matrices that gains nothing, and where other programs
# share the cores a solve takes up to fifty times as long. XLA keeps its own threads.
# (SciPy is imported first because only libraries that are loaded can be limited.)
single_threaded_lapack = threadpoolctl.threadpool_limits.wrap(limits=1, user_api="blas")

# The options of glibc's mallopt, numbers and values. With one arena there is no other
# that cannot hold large blocks.
_MALLOC = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}


def keeps_memory(main: Callable[..., None]) -> Callable[..., None]:
    """A main function whose process keeps the memory that it frees, on glibc.

    A compiled step frees its temporary memory at its end. glibc gives blocks of some
    megabytes back to the system, which hands out zeroed pages again in the next step.
    On a CPU this took 1.2 of the 3.1 ms of a task of second-order MAML (four-block
    network, 16 tasks at once).
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        if platform.libc_ver()[0] == "glibc":
            for option, value in _MALLOC.values():
                ctypes.CDLL(None).mallopt(option, value)
        main(*args, **kwargs)

    return run


def peak_gigabytes() -> float:
    """What the process held in memory at the most, until now."""
    import resource  # which not every system has

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def runs_experiments(main: Callable[..., None]) -> Callable[..., None]:
    """A main function that trains and takes times: all that this module offers it."""
    return keeps_memory(keeps_programs(single_threaded_lapack(main)))


def keeps_programs(main: Callable[..., None]) -> Callable[..., None]:
    """A main function that finds what it compiled before, in jax's persistent cache.

    The cache lies where jax is told (`JAX_COMPILATION_CACHE_DIR`), else in `dsbp_jax`
    of the user's cache folder. Only programs that took a second are kept.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        if jax.config.jax_compilation_cache_dir is None:
            folder = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
            jax.config.update(
                "jax_compilation_cache_dir", str(pathlib.Path(folder) / "dsbp_jax")
            )
        main(*args, **kwargs)

    return run


def compiles_fast() -> None:
    """Compiles without optimising, from here on, in half the time.

    For processes, and those that they start, whose steps are few. It must come before
    JAX's first computation. Fusions are emitted in the older way where jaxlib still
    has it.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags.append("--xla_backend_optimization_level=0")
    # From 0.11 on XLA does not know it, and ends the process.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(flags))
