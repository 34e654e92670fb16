"""Widths under LayerNorm: copies, the dead among them, are merged and counted."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from dsbp_jax.architecture import merging
from dsbp_jax.layers import map_paths
from tests.architecture import models
from tests.architecture.test_compression import close
from tests.layers.models import filled, normal


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.LayerNorm()(nn.Dense(16)(x))))


def linen_normed():
    model, x = Normed(), normal(50, 6, seed=9)
    return models.Model(model.apply, filled(model.init, models.KEY, x), x)


class EquinoxNormed(eqx.Module):
    """Its norm subtracts the mean before it squares: zeros do count."""

    up: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    down: eqx.nn.Linear

    def __init__(self, key):
        self.up = eqx.nn.Linear(6, 16, key=key)
        self.norm = eqx.nn.LayerNorm(16)
        self.down = eqx.nn.Linear(16, 3, key=key)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.norm(self.up(x))))


def equinox_normed():
    fn = lambda net, x: jax.vmap(net)(x)
    return models.Model(fn, filled(EquinoxNormed, models.KEY), normal(50, 6, seed=9))


def copied(model, groups, sources):
    """The last entries of each merged width made copies of others, -1 of nothing."""
    taken = {
        (site.path, axis)
        for site in groups.structure.traced.sites
        for axis in site.view.input_axes
    }
    edits = {
        (place.path, place.axis)
        for group in groups.groups
        if group.merged
        for place in group.places
    } - taken

    def edit(path, leaf):
        for other, axis in edits:
            if other == path:
                moved = np.moveaxis(np.array(leaf), axis, 0)
                for at, source in enumerate(reversed(sources), start=1):
                    moved[-at] = 0 if source < 0 else moved[source]
                leaf = jnp.asarray(np.moveaxis(moved, 0, axis))
        return leaf

    return map_paths(edit, model.params)


@pytest.mark.parametrize(
    "build",
    [
        linen_normed,
        equinox_normed,
        pytest.param(models.linen_vit, marks=pytest.mark.slow),
        pytest.param(models.linen_scanned, marks=pytest.mark.slow),
    ],
    ids=lambda build: build.__name__,
)
def test_copies_under_layer_norm_are_merged(build):
    model = build()
    groups = architecture.groups(model.fn, model.params, model.x)
    params = copied(model, groups, [0, 1, 1, -1, -1])
    protect = [g.name for g in groups.groups if not g.merged and not g.reason]
    plan = architecture.plan(
        model.fn, params, [model.x], energy=0.5, multiple_of=1, protect=protect
    )
    # The two dead ones are one: it still counts in the mean.
    assert [one.width for one in plan.groups] == [12]
    assert "copies merged" in str(plan)
    small = architecture.compress(model.fn, params, plan)
    assert not small.report.same_function  # its own mean would count them once
    run = jax.jit(lambda arrays, x: small.apply(eqx.combine(arrays, rest), x))
    arrays, rest = eqx.partition(small.params, eqx.is_array)
    for x in (model.x, model.x[:5]):
        close(run(arrays, x), model.fn(params, x), 1e-5)


def test_a_width_that_is_asked_for_keeps_some_copies():
    model = linen_normed()
    groups = architecture.groups(model.fn, model.params, model.x)
    params = copied(model, groups, [0, 0, 0, 1, 1])
    plan = architecture.plan(model.fn, params, [model.x], energy=0.5, multiple_of=7)
    (cut,) = plan.cuts
    assert (cut.width, cut.weights.sum()) == (14, 16)
    small = architecture.compress(model.fn, params, plan)
    close(small.apply(small.params, model.x), model.fn(params, model.x), 1e-5)


def test_nothing_else_goes():
    model = linen_normed()
    plan = architecture.plan(model.fn, model.params, [model.x], energy=0.01)
    assert [one.width for one in plan.groups] == [16]
    with pytest.raises(ValueError, match="no plan keeps flops"):
        architecture.plan(model.fn, model.params, [model.x], flops=0.5)


def test_groups_of_a_group_norm_stay():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3))(x)
            return nn.Dense(2)(nn.relu(nn.GroupNorm(4)(x)).mean((1, 2)))

    model, x = Grouped(), normal(2, 4, 4, 3)
    params = filled(model.init, models.KEY, x)
    groups = architecture.groups(model.apply, params, x)
    assert all(group.reason for group in groups.groups), groups


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_entries_are_alike_bit_by_bit_but_for_the_sign_of_zero(dtype):
    column = np.array([[1, 0], [1, 0], [2, 0], [1, 3]]).astype(dtype)
    other = np.array([[-0.0], [0.0], [0.0], [0.0]]).astype(dtype)
    first, second, *others = merging._digests([column, other], 4)
    assert first == second
    assert len({first, *others}) == 3
    assert len(set(merging._digests([], 4))) == 1
