"""The transforms under float64, which global flags are not needed for.

`python -m pytest -m x64`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.transforms import models
from tests.transforms.catalogue import TRANSFORMS, run

pytestmark = [pytest.mark.x64, pytest.mark.promotes]
transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@transforms
def test_updates_are_float64_and_agree_with_float32(make):
    narrow, _ = run(make(), models.params(jnp.float32))
    wide, state = run(make(), models.params(jnp.float32), dtype=jnp.float64)
    for name, leaf in wide.items():
        if leaf is not None:
            assert leaf.dtype == jnp.float64
            np.testing.assert_allclose(leaf, narrow[name], atol=2e-3)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))


@transforms
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_what_float32_cannot_hold_passes(make, scale):
    """Gradients; and params, of those that read them, of the usual size."""
    if make is TRANSFORMS["lie_rotation"] and scale > 1:
        pytest.skip("a gradient's scale is the angle of the rotation")
    tx, params = make(), models.params(jnp.float64)
    grads = jax.tree.map(lambda p: scale * p, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    leaves = jax.tree.leaves((updates, state))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    np.testing.assert_array_equal(
        jnp.sign(updates["bias"]), jnp.sign(run(tx, params, steps=1)[0]["bias"])
    )


@transforms
def test_a_cold_leaf_passes_through_exactly(make):
    """Nothing goes through float32 on its way."""
    params = {"bias": jax.random.normal(jax.random.key(0), (9,), jnp.float64)}
    params["dense"] = models.params(jnp.float64)["dense"]
    if make is TRANSFORMS["spectral_sam"]:
        pytest.skip("its updates are of other gradients")
    tx = make()
    updates, _ = tx.update(params, tx.init(params), params, refresh=False)
    # Whatever an optimizer does to a bias, it does in float64.
    ratio = np.asarray(updates["bias"] / params["bias"])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-14)


def test_a_projection_holds_to_the_last_digit():
    import dsbp_jax

    w = jax.random.normal(jax.random.key(0), (9, 7), jnp.float64)
    tx = dsbp_jax.spectral_projection(3, residual=0.5)
    updates, state = tx.update({"w": w}, tx.init({"w": w}))
    v = np.asarray(dsbp_jax.bases(state)["w"].vectors, np.float64)
    expected = w - 0.5 * (w - w @ v @ v.T)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-13, atol=1e-14)
    cold, _ = tx.update({"w": 1e200 * w}, tx.init({"w": w}), refresh=False)
    np.testing.assert_array_equal(cold["w"], 1e200 * w)
