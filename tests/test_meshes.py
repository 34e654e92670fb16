import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax.meshes import vary, varying_axes, with_auto_axes
from tests.layers.models import normal
from tests.marks import quick

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def on_two_devices(function):
    """A function that each of two devices runs on a slice of its own."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AUTO,))
    local = lambda *args: jax.tree.map(
        lambda leaf: leaf[None], function(*(arg[0] for arg in args))
    )
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
    )


def test_constants_vary_once_asked_to():
    seen = []

    def body(x):
        seen.append((varying_axes(x), varying_axes(jnp.zeros(2))))
        seen.append(varying_axes(*vary((jnp.zeros(2), x), varying_axes(x))))
        return x

    on_two_devices(body)(normal(2, 3))
    assert seen == [(frozenset({"d"}), frozenset()), frozenset({"d"})]


TRANSFORMS = {
    "dsbp": dsbp_jax.dsbp(0.1, 4, refresh_every=2),
    "both sides, one shape": dsbp_jax.spectral_projection(4, side="both"),
    "subspace": dsbp_jax.spectral_subspace(optax.sgd(0.1, 0.9), 4, refresh_every=1),
    "rotation": dsbp_jax.lie_rotation(0.1, rank=4, momentum=0.9),
    "tolerant": dsbp_jax.track_bases(4, tolerance=0.5),
    "whitening": optax.chain(
        dsbp_jax.spectral_whitening(4, refresh_every=2), optax.scale(-0.1)
    ),
}


@pytest.mark.parametrize("name", quick(TRANSFORMS, ("dsbp", "tolerant", "whitening")))
def test_each_device_trains_params_of_its_own(name):
    """As an ensemble or local SGD does, `init` included."""
    tx = TRANSFORMS[name]

    def train(w, v, x):
        params = {"w": w, "v": v}
        state = tx.init(params)
        loss = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0][0]

    args = normal(2, 12, 12), normal(2, 12, 12, seed=1), normal(2, 32, 12, seed=2)
    found = on_two_devices(train)(*args)
    for device in range(2):
        alone = jax.jit(train)(*(arg[device] for arg in args))
        for name, leaf in alone.items():
            np.testing.assert_allclose(found[name][device], leaf, rtol=1e-2, atol=1e-3)


def test_products_are_placed_under_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(EXPLICIT,))
    with jax.set_mesh(mesh):
        a = jax.device_put(normal(4, 6), jax.NamedSharding(mesh, jax.P(None, "x")))
        b = jax.device_put(normal(6, 3), jax.NamedSharding(mesh, jax.P("x")))
        run = functools.partial(with_auto_axes, jnp.matmul, out_specs=lambda: jax.P())
        np.testing.assert_allclose(run(a, b), normal(4, 6) @ normal(6, 3), atol=1e-5)
