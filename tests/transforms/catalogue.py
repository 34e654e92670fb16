"""All public transforms, and runs of them that tests look at.

A new transform enters `TRANSFORMS` and gets all tests of `test_conformance`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg
from dsbp_jax.tracking import Eigenspace
from tests.layers.models import normal
from tests.transforms import models

# So many Krylov blocks that these small leaves are solved exactly: what is compared
# here is the transform, not the convergence.
BARE = {"layout": models.LAYOUT}
SHARED = {**BARE, "num_blocks": 12}


def basis(dim, *batch):
    """An input-side basis as of a source task: three random directions."""
    return linalg.EigenBasis(
        jnp.broadcast_to(jnp.linalg.qr(normal(dim, 3))[0], (*batch, dim, 3)),
        jnp.broadcast_to(jnp.array([3.0, 2.0, 1.0]), (*batch, 3)),
        jnp.full(batch, 7.0),
    )


SOURCE_BASES = {
    "dense": basis(12),
    "conv": basis(6),
    "stacked": basis(10, 3),
    "stored (out, in)": basis(12),
    "square": Eigenspace(
        basis(10), jnp.array(True), models.LAYOUT["square"], "input", "activation"
    ),
}


def gradients(params, step):
    """What evaluates gradients itself gets these."""
    del step
    return jax.tree.map(lambda p: p * (1 + 0.1 * jnp.sin(p)), params)


def with_gradients(tx):
    """The same transformation, `update` with a `grad_fn`."""
    update = lambda *args, **extra: tx.update(*args, **{**extra, "grad_fn": gradients})
    return optax.GradientTransformationExtraArgs(tx.init, update)


TRANSFORMS = {
    "spectral_projection": functools.partial(
        dsbp_jax.spectral_projection, 3, residual=0.2, **SHARED
    ),
    "add_spectral_decay": functools.partial(
        dsbp_jax.add_spectral_decay, 0.1, source="gradient", **SHARED
    ),
    "dsbp": functools.partial(
        dsbp_jax.dsbp, 0.1, 3, decay=0.01, energy=0.99, refresh_every=2, **SHARED
    ),
    "spectral_subspace": functools.partial(
        dsbp_jax.spectral_subspace,
        optax.sgd(0.1, momentum=0.9),
        3,
        side="output",
        residual=0.2,
        max_growth=1.01,
        refresh_every=2,
        **SHARED,
    ),
    "spectral_sam": lambda: with_gradients(
        dsbp_jax.spectral_sam(optax.sgd(0.1, momentum=0.9), 0.1, rank=3, **SHARED)
    ),
    "lie_rotation": functools.partial(
        dsbp_jax.lie_rotation,
        0.01,
        rank=3,
        side="output",
        momentum=0.9,
        radial=0.2,
        refresh_every=2,
        **SHARED,
    ),
    "add_spectral_transfer": functools.partial(
        dsbp_jax.add_spectral_transfer,
        0.1,
        models.params(seed=1),
        SOURCE_BASES,
        layout=models.LAYOUT,
    ),
    "project_away": functools.partial(
        dsbp_jax.project_away, SOURCE_BASES, layout=models.LAYOUT
    ),
    "spectral_whitening": functools.partial(
        dsbp_jax.spectral_whitening, 3, residual=0.9, refresh_every=2, **SHARED
    ),
    "spectral_muon": functools.partial(
        dsbp_jax.spectral_muon,
        0.1,
        3,
        weight_decay=0.1,
        refresh_every=2,
        hidden=lambda path, leaf: path != "attention",
        layout=models.LAYOUT,
    ),
    "track_bases": functools.partial(
        dsbp_jax.track_bases, 3, refresh_every=2, **SHARED
    ),
}
UNTRACKED = ("add_spectral_transfer", "project_away")
# Those that hand whatever is no matrix to an optimizer of optax.
OPTIMIZERS = [
    TRANSFORMS[name]
    for name in (
        "dsbp",
        "spectral_subspace",
        "spectral_sam",
        "lie_rotation",
        "spectral_muon",
    )
]

# optax's adamw promotes.
PROMOTES = ("spectral_muon",)

# What wraps a transformation, or places it, is one code for all of them: looked at
# often are one that projects, one that divides, and those that follow nothing.
SLOW = (
    *("lie_rotation", "spectral_muon", "spectral_sam", "dsbp"),
    *("spectral_subspace", "track_bases", "add_spectral_decay"),
)


def every(values, *, slow=()):
    """Parameters of a test, by the name of their transform, with its marks."""
    marks = lambda name: [
        *([pytest.mark.promotes] if name in PROMOTES else []),
        *([pytest.mark.slow] if name in slow else []),
    ]
    return [
        pytest.param(value, id=name, marks=marks(name))
        for name, value in values.items()
    ]


transforms = pytest.mark.parametrize("make", every(TRANSFORMS))
wrapped = pytest.mark.parametrize("make", every(TRANSFORMS, slow=SLOW))


def assert_same_types(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_equal(
            (jnp.shape(x), jnp.result_type(x)), (jnp.shape(y), jnp.result_type(y))
        ),
        a,
        b,
    )


def is_basis(node):
    return isinstance(node, linalg.EigenBasis)


def angles(leaf, step):
    return (step * jnp.arange(leaf.shape[-1])).astype(jnp.float32)


def turned(params, step):
    """Gradients whose eigenbasis turns: stale and fresh make a difference."""
    weigh = lambda p: 1 + 0.5 * jnp.cos(angles(p, step))
    return jax.tree.map(lambda p: p * weigh(p).astype(p.dtype), params)


class Run(NamedTuple):
    """What a few compiled steps give, the state before them, the updates of the
    first alone, and how often they were traced."""

    updates: Any
    state: Any
    start: Any
    first: Any
    traces: int


def trained(tx, params, steps=4, **extra):
    """The run of a transform."""
    traces = []

    @jax.jit
    def update(step, state, params):
        traces.append(1)
        return tx.update(turned(params, step), state, params, **extra)

    start = state = tx.init(params)
    every = []
    for step in range(steps):
        updates, state = update(jnp.int32(step), state, params)
        every.append(updates)
    return Run(every[-1], state, start, every[0], len(traces))


def run(tx, params, dtype=None, **options):
    """Updates and state after a few compiled steps, of leaves cast to a dtype."""
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return trained(tx, params, **options)[:2]


@functools.cache
def whole_run(make, dtype=jnp.float32):
    """The run on every kind of leaf, which several tests look at."""
    return trained(make(), models.params(dtype))


# What is asked of a tree, not of its leaves, is asked of a smaller one.
def some_params(dtype=jnp.float32):
    params = models.params(dtype)
    return {name: params[name] for name in ("dense", "conv", "stacked", "bias", "hole")}


@functools.cache
def some_run(make):
    """The run on a few kinds of leaf, which several tests look at."""
    return trained(make(), some_params())


@functools.cache
def dense_run(make):
    """The run on one kernel alone."""
    return trained(make(), {"dense": models.params()["dense"]})


# What a mesh of 4 × 2 can hold.
def few_params():
    params = models.params()
    return {name: params[name] for name in ("dense", "stacked", "bias")}
